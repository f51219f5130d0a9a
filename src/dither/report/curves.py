"""Curves of a few series over one axis, as an SVG text for a document: markers joined by lines, each series with its own colour and shape."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from dither.report import palette
from dither.report.axes import Axis, linear_domain, log_domain
from dither.report.frame import frame, legend, marker, titles
from dither.report.numbers import short
from dither.report.style import plot_style
from dither.report.svg import label, picture, tag
from dither.report.text import clean

_WIDTH, _HEIGHT, _MARGIN = 640.0, 300.0, 14.0

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Scale:
    """An axis: its title, whether it is logarithmic, and values that it must reach."""

    title: str
    log: bool = False
    reach: tuple[float, ...] = ()


def curves(heading: str, series: Mapping[str, Points], x: Scale, y: Scale) -> str:
    """The drawing. Points that are not finite, and points that a logarithmic axis cannot show, are left out. Raises ValueError where none is left."""
    kept = {name: sorted(p for p in points if _drawable(p, x, y)) for name, points in series.items()}
    every = [p for points in kept.values() for p in points]
    if not every:
        raise ValueError("series: hold no point that can be drawn")
    keys, room = legend(list(kept), 2, _WIDTH, 26)
    top = 26 + room + 26
    bottom = top + _HEIGHT
    across = Axis(*_domain([a for a, _ in every], x), 58, _WIDTH - 8, log=x.log)
    up = Axis(*_domain([b for _, b in every], y), bottom, top, log=y.log)
    parts: list[Markup] = [label(heading, 2, 10, class_="head"), keys, frame(across, up, bottom), *titles(across, bottom, top, x.title, y.title)]
    for index, (name, points) in enumerate(kept.items()):
        places = [(across(a), up(b)) for a, b in points]
        line = "M" + "L".join(f"{px:.2f} {py:.2f}" for px, py in places)
        colour = f"var(--s{index % palette.COLOURS})"
        if len(places) > 1:
            parts.append(tag("path", d=line, fill="none", stroke=colour, stroke_width=1.5))
        for (a, b), (px, py) in zip(points, places, strict=True):
            parts.append(marker(index, px, py, title=f"{name}: {short(a)}, {short(b)}", r=4.5))
    edge = _MARGIN - 1
    height = bottom + 44
    card = tag("rect", x=-edge, y=-edge, width=_WIDTH + 2 * edge, height=height + 2 * edge, rx=8, fill="var(--bg)", stroke="var(--line)")
    style = tag("style", Markup(plot_style()))
    return picture(_WIDTH, height, clean(heading), _told(kept, x, y), "curves", style, card, *parts, margin=_MARGIN) + "\n"


def _drawable(point: tuple[float, float], x: Scale, y: Scale) -> bool:
    return all(math.isfinite(v) and (v > 0 or not scale.log) for v, scale in zip(point, (x, y), strict=True))


def _domain(values: list[float], scale: Scale) -> tuple[float, float]:
    values = [*values, *scale.reach]
    return log_domain(values, 1.5) if scale.log else linear_domain(values, 1e-3)


def _told(series: Mapping[str, Points], x: Scale, y: Scale) -> str:
    """The plot in words: where each curve begins and ends."""
    ends = (f"{name} from {short(p[0][1])} at {short(p[0][0])} to {short(p[-1][1])} at {short(p[-1][0])}" for name, p in series.items() if p)
    return f"{y.title} over {x.title}. " + "; ".join(ends) + "."
