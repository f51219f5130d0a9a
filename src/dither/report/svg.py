"""SVG elements as escaped text."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup, escape

from dither.report.labels import Box
from dither.report.text import clean


def tag(name: str, *children: str, **attributes: str | float | None) -> Markup:
    """``<name ...>children</name>``. Text is cleaned and escaped unless it is Markup; ``class_`` becomes ``class``,
    ``stroke_width`` ``stroke-width``; None leaves an attribute out; floats are written with at most two decimals."""
    parts = [f"<{name}"]
    for key, value in attributes.items():
        if value is not None:
            text = number(value) if isinstance(value, int | float) else clean(value)
            parts.append(f' {key.rstrip("_").replace("_", "-")}="{escape(text)}"')
    if not children:
        return Markup("".join(parts) + "/>")
    inner = "".join(child if isinstance(child, Markup) else str(escape(clean(child))) for child in children)
    return Markup("".join(parts) + f">{inner}</{name}>")


def number(value: float) -> str:
    """At most two decimals."""
    text = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
    return "0" if text == "-0" else text


def picture(
    width: float,
    height: float,
    title: str,
    description: str,
    uid: str,
    *children: str,
    class_: str = "plot",
    margin: float = 0.0,
) -> Markup:
    """A whole drawing with its accessible name and description. ``uid`` must be unique in the page."""
    head = (tag("title", title, id=f"{uid}-t"), tag("desc", description, id=f"{uid}-d"))
    w, h = width + 2 * margin, height + 2 * margin
    return tag(
        "svg",
        *head,
        *children,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=" ".join(number(value) for value in (-margin, -margin, w, h)),
        role="img",
        aria_labelledby=f"{uid}-t",
        aria_describedby=f"{uid}-d",
        class_=class_,
        width=w,
        height=h,
    )


@dataclass(frozen=True)
class Drawing:
    """A plot in two layouts, for wide and for narrow screens: text keeps its size, so it is laid out anew instead of
    shrunk."""

    wide: Markup
    narrow: Markup


def label(text: str, x: float, y: float, anchor: str = "start", class_: str = "label") -> Markup:
    """Text whose vertical middle is about ``y``."""
    return tag("text", text, x=x, y=y + 4, text_anchor=anchor, class_=class_)


def box_of(x: float, y: float, r: float) -> Box:
    """The square that a mark of radius ``r`` covers."""
    return Box(x - r, y - r, x + r, y + r)
