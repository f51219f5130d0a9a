"""What surrounds a plot's marks: grid, ticks, axis titles, and the legend."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from dither.report import palette
from dither.report.axes import Axis
from dither.report.numbers import linear_labels, tick
from dither.report.svg import label, tag
from dither.report.text import fit, width

SMALL = 11.0  # pixels, of tick labels and legends


def frame(x: Axis, y: Axis, bottom: float, x_ticks: Sequence[float] | None = None) -> Markup:
    """Grid lines and tick labels that do not touch each other; the base line lies at ``bottom``."""
    parts: list[Markup] = []
    levels = y.ticks(34)
    narrow = not y.log or (len(levels) > 0 and levels[-1] < 10 * levels[0])  # one magnitude: as many decimals for all
    texts = linear_labels(levels) if narrow else [tick(value) for value in levels]
    for value, text in zip(levels, texts, strict=True):
        parts.append(tag("line", x1=x.start, x2=x.end, y1=y(value), y2=y(value), class_="grid"))
        parts.append(label(text, x.start - 6, y(value), "end", "tick"))
    reach = -1e9
    marks = x.ticks(64) if x_ticks is None else x_ticks
    for value, text in zip(marks, linear_labels(marks), strict=True):
        half = width(text, SMALL) / 2
        parts.append(tag("line", x1=x(value), x2=x(value), y1=bottom, y2=bottom + 4, class_="axis"))
        if x(value) - half > reach + 4:
            parts.append(label(text, x(value), bottom + 13, "middle", "tick"))
            reach = x(value) + half
    parts.append(tag("line", x1=x.start, x2=x.end, y1=bottom, y2=bottom, class_="axis"))
    return Markup("").join(parts)


def titles(x: Axis, bottom: float, top: float, x_title: str, y_title: str) -> list[Markup]:
    """What the axes show: x below its right end, y above its top so that it reads horizontally."""
    return [
        label(fit(x_title, x.end - 4, SMALL), x.end, bottom + 34, "end", "soft"),
        label(fit(y_title, x.end - 4, SMALL), 2, top - 13, class_="soft"),
    ]


def marker(series: int, x: float, y: float, title: str = "", r: float = 5.5, class_: str = "") -> Markup:
    """The mark of a series, with its tooltip. Colour and shape both differ between neighbouring series."""
    hover = (tag("title", title),) if title else ()
    return tag(
        "path", *hover, d=palette.shape(series, x, y, r), class_=f"mark s{series % palette.COLOURS} {class_}".rstrip()
    )


def legend(names: Sequence[str], left: float, right: float, top: float) -> tuple[Markup, float]:
    """Markers with their names, in rows between ``left`` and ``right``; also the height used."""
    parts: list[Markup] = []
    x, y = left, top + 9
    for series, name in enumerate(names):
        text = fit(name, right - left - 24, SMALL)
        room = 22 + width(text, SMALL)
        if x > left and x + room > right:
            x, y = left, y + 18
        parts.append(
            Markup("").join((marker(series, x + 7, y, r=4.5, class_="key"), label(text, x + 17, y, "start", "soft")))
        )
        x += room + 10
    return Markup("").join(parts), (y + 11 - top if names else 0.0)
