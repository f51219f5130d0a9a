"""Heat strips: one row of cells a series, one cell a block, darker (on white) for more error, on a log scale.

Cells of a row that share a colour are one path, so a page with thousands of cells stays small.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from dither.report import numbers
from dither.report.axes import Axis
from dither.report.frame import SMALL
from dither.report.palette import HEAT_STEPS
from dither.report.svg import label, picture, tag
from dither.report.text import fit, width
from dither.report.ticks import integer_ticks


@dataclass(frozen=True)
class Strip:
    """One row: its name and a value for each column (None: nothing there)."""

    name: str
    values: tuple[float | None, ...]


@dataclass(frozen=True)
class HeatScale:
    """Positive values to ``HEAT_STEPS`` colours, evenly in the logarithm."""

    lo: float
    hi: float

    @classmethod
    def over(cls, strips: Sequence[Strip]) -> HeatScale:
        found = [v for strip in strips for v in strip.values if v is not None and math.isfinite(v) and v > 0]
        lo, hi = min(found, default=1.0), max(found, default=1.0)
        return cls(lo, hi)

    def step(self, value: float | None) -> int | None:
        if value is None or math.isnan(value):
            return None
        if value <= self.lo:
            return 0
        if value >= self.hi:
            return HEAT_STEPS - 1
        part = (math.log(value) - math.log(self.lo)) / (math.log(self.hi) - math.log(self.lo))
        return min(int(part * HEAT_STEPS), HEAT_STEPS - 1)


def heat(
    strips: Sequence[Strip],
    columns: Sequence[int | None],
    unit: str,
    title: str,
    uid: str,
    w: float,
    *,
    beside: bool,
    scale: HeatScale | None = None,
) -> Markup:
    """The strips with a colour bar on top and the blocks below. ``columns`` are block indices; None (outside of the
    blocks) stands apart at the right. ``beside``: names at the left of the strips, for wide screens; else above
    them."""
    scale = scale or HeatScale.over(strips)
    names = min(max((width(s.name, SMALL) for s in strips), default=0) + 10, 210) if beside else 0.0
    means = [_mean(s.values) for s in strips]
    right = w - 58 if beside else w - 2
    outside = 14.0 if None in columns else 0.0
    inner = [c for c in columns if c is not None]
    pitch = (right - names - outside) / max(len(inner) + (1 if outside else 0), 1)
    pitch = min(pitch, 40.0)
    height, step = (15.0, 19.0) if beside else (15.0, 36.0)

    parts = [_colour_bar(scale, unit, w)]
    y = 62.0 if beside else 50.0
    if beside and strips:
        parts.append(label("mean", w - 2, y - 10, "end", "tick"))
    for strip, mean in zip(strips, means, strict=True):
        if beside:
            parts.append(label(fit(strip.name, names - 8, SMALL), names - 8, y + height / 2, "end", "soft"))
            parts.append(label(numbers.short(mean), w - 2, y + height / 2, "end", "tick"))
        else:
            room = width(f"mean {numbers.short(mean)}", SMALL)
            parts.append(label(fit(strip.name, w - room - 16, SMALL), 0, y + 7, class_="soft"))
            parts.append(label(f"mean {numbers.short(mean)}", w - 2, y + 7, "end", "tick"))
        top = y if beside else y + 16
        parts.append(_cells(strip, columns, scale, names, top, pitch, height, outside))
        y += step
    if len(inner) > 1:
        axis = Axis(inner[0], inner[-1], names + pitch / 2, names + pitch * (len(inner) - 0.5))
        for block in integer_ticks(inner[0], inner[-1], max(int(pitch * len(inner) / 46), 2)):
            parts.append(label(str(block), axis(block), y + 8, "middle", "tick"))
    elif inner:
        parts.append(label(str(inner[0]), names + pitch / 2, y + 8, "middle", "tick"))
    parts.append(label("block", names, y + 26, class_="soft"))
    if outside:
        parts.append(label("outside", names + pitch * (len(inner) + 1) + outside, y + 26, "end", "tick"))
    told = (
        "; ".join(f"{s.name}: mean {numbers.short(m)}" for s, m in zip(strips, means, strict=True)) or "nothing to draw"
    )
    return picture(w, y + 36, title, f"{unit}, on a log scale. {told}.", uid, *parts, class_="plot heat")


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None and math.isfinite(v)]
    return sum(known) / len(known) if known else None


def _cells(
    strip: Strip,
    columns: Sequence[int | None],
    scale: HeatScale,
    left: float,
    top: float,
    pitch: float,
    height: float,
    outside: float,
) -> Markup:
    gap = 1.0 if pitch > 5 else 0.0
    by_step: dict[int | None, list[str]] = {}
    for k, (column, value) in enumerate(zip(columns, strip.values, strict=True)):
        x = left + k * pitch + (outside if column is None else 0.0)
        cell = f"M{x:.1f} {top:.1f}h{pitch - gap:.2f}v{height:.0f}h{gap - pitch:.2f}z"
        by_step.setdefault(scale.step(value), []).append(cell)
    paths = [
        tag("path", d="".join(cells), class_="none" if step is None else f"h{step}") for step, cells in by_step.items()
    ]
    # the script reads these to tell the value under the pointer
    return tag(
        "g",
        *paths,
        class_="strip",
        data_name=strip.name,
        data_left=left,
        data_pitch=pitch,
        data_columns=" ".join("-" if c is None else str(c) for c in columns),
        data_values=" ".join("-" if v is None else numbers.short(v).replace(" ", "_") for v in strip.values),
    )


def _colour_bar(scale: HeatScale, unit: str, w: float) -> Markup:
    lo, hi = numbers.short(scale.lo), numbers.short(scale.hi)
    x = 2 + width(lo, SMALL) + 4
    cells = [tag("rect", x=x + 12 * k, y=20, width=12, height=11, class_=f"h{k}") for k in range(HEAT_STEPS)]
    words = label(fit(unit, w - 4, SMALL), 2, 7.5, class_="soft")
    ends = (label(lo, 2, 25.5, class_="tick"), label(hi, x + 12 * HEAT_STEPS + 6, 25.5, class_="tick"))
    return Markup("").join((words, ends[0], *cells, ends[1]))
