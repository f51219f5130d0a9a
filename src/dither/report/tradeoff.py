"""The picture of a comparison: what each method costs in quality at the bits that it really stores.

Perplexity (or its excess over float), on a log axis, against true bits per weight; one mark a row, the float model as
a line, and the Pareto front as a staircase: what can be had at no more than so many bits. What lies more than 20 times
above float would squash the rest, so it stands in a band of its own on top, with an arrow and its value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from dither.report import numbers
from dither.report.axes import Axis, linear_domain, log_domain
from dither.report.frame import SMALL, frame, legend, marker, titles
from dither.report.labels import Box, Label, Placed, place
from dither.report.pareto import pareto_front
from dither.report.records import CompareRecord, Row
from dither.report.svg import Drawing, box_of, label, picture, tag
from dither.report.text import clean, fit, width

OFF_SCALE = 20.0  # times the float perplexity
_ABSURD = 1e100  # a float perplexity beyond this is no reference
_LEAST_EXCESS = 0.05  # percent; less than that is level with float
_LANE = 17.0  # pixels between stacked off-scale marks
_MOST_LANES = 10
_APART = 30.0  # pixels between off-scale marks that share a lane: a mark and its arrow
_LABELLED = 16  # rows up to which every mark may carry its name


@dataclass(frozen=True)
class Quantity:
    """What the y axis shows. Values outside of ``[least, most]`` are off scale; ``ratio`` is the least that the axis
    spans; ``reference`` is drawn as a line."""

    title: str
    of: Callable[[Row], float | None]
    show: Callable[[float | None], str]
    reference: float | None
    least: float
    most: float
    ratio: float


def perplexity(record: CompareRecord) -> Quantity:
    """Perplexity itself, with the float model as reference."""
    known = 0 < record.float_perplexity < _ABSURD
    lowest = min((row.perplexity or 0.0 for row in record.rows if row.measured), default=1.0)
    most = OFF_SCALE * (record.float_perplexity if known else lowest)
    return Quantity(
        title="perplexity (log scale)",
        of=lambda row: row.perplexity,
        show=numbers.perplexity,
        reference=record.float_perplexity if known else None,
        least=0.0,
        most=most,
        ratio=1.25,
    )


def excess() -> Quantity:
    """Perplexity over float in percent: the same figures, spread out where methods come close to float."""
    return Quantity(
        title="excess over float, % (log scale)",
        of=lambda row: row.excess_percent,
        show=numbers.percent,
        reference=None,
        least=_LEAST_EXCESS,
        most=100 * (OFF_SCALE - 1),
        ratio=4.0,
    )


def front(record: CompareRecord) -> set[int]:
    """The rows on the Pareto front of perplexity and true bits per weight."""
    nowhere = (math.nan, math.nan)
    return set(
        pareto_front(
            [(row.bits_per_weight or 0.0, row.perplexity or 0.0) if row.measured else nowhere for row in record.rows]
        )
    )


def tradeoff(record: CompareRecord, quantity: Quantity, uid: str) -> Drawing:
    """The plot, laid out for wide and for narrow screens."""

    wide, narrow = sketch(record, quantity, 760, 330), sketch(record, quantity, 340, 280)
    return Drawing(
        picture(wide.width, wide.height, wide.title, wide.description, f"{uid}w", *wide.parts),
        picture(narrow.width, narrow.height, narrow.title, narrow.description, f"{uid}n", *narrow.parts),
    )


@dataclass(frozen=True)
class Sketch:
    """A drawing that still lacks its frame."""

    width: float
    height: float
    title: str
    description: str
    parts: tuple[Markup, ...]


@dataclass(frozen=True)
class _Layout:
    """Where everything is, in pixels. ``at`` maps a row to its mark; ``band`` and ``foot`` are the heights of what is
    above and below the scale."""

    x: Axis
    y: Axis
    top: float
    bottom: float
    band: float
    foot: float
    at: dict[int, tuple[float, float]]
    on: list[int]
    above: list[int]


def _layout(record: CompareRecord, quantity: Quantity, right: float, top: float, h: float) -> _Layout:
    bits = {i: b for i, row in enumerate(record.rows) if (b := _known(row)) is not None}
    value = {i: v for i in bits if (v := quantity.of(record.rows[i])) is not None and not math.isnan(v)}
    on = [i for i, v in value.items() if quantity.least <= v <= quantity.most]
    below = [i for i, v in value.items() if v < quantity.least]
    above = sorted((i for i in bits if i not in on and i not in below), key=lambda i: value.get(i, math.inf))

    x = Axis(*linear_domain(bits.values() or [2.0, 5.0], 1.0, 0.08), 58, right)
    lanes = _lanes([x(bits[i]) for i in above])
    band = _LANE * (max(lanes) + 1) + 10 if lanes else 0.0
    foot = _LANE + 5 if below else 0.0
    bottom = top + band + h + foot
    shown = [value[i] for i in on] + ([quantity.reference] if quantity.reference is not None else [])
    y = Axis(*log_domain(shown or [10.0, 100.0], quantity.ratio, 0.07), bottom - foot, top + band, log=True)

    at = {i: (x(bits[i]), y(value[i])) for i in on}
    at |= {i: (x(bits[i]), top + band - 8 - _LANE * (lane + 0.5)) for i, lane in zip(above, lanes, strict=True)}
    at |= {i: (x(bits[i]), bottom - _LANE / 2) for i in below}
    return _Layout(x, y, top, bottom, band, foot, at, on, above)


def _known(row: Row) -> float | None:
    """The row's bits per weight, if it can be drawn at all."""
    b = row.bits_per_weight
    return b if row.status == "ok" and b is not None and math.isfinite(b) else None


def _lanes(xs: Sequence[float]) -> list[int]:
    """Stack marks that would cover each other: the lane of each, at most ``_MOST_LANES``."""
    lanes: list[int] = []
    for k, x in enumerate(xs):
        used = {lanes[j] for j in range(k) if abs(xs[j] - x) < _APART}
        lanes.append(next((lane for lane in range(_MOST_LANES) if lane not in used), _MOST_LANES - 1))
    return lanes


def sketch(record: CompareRecord, quantity: Quantity, w: float, h: float, heading: Sequence[str] = ()) -> Sketch:
    """The plot, ``w`` pixels wide and with a scale of ``h`` pixels, below the lines of ``heading``."""
    # colour and shape of each method, in order of appearance
    series = {name: i for i, name in enumerate(dict.fromkeys(row.method for row in record.rows))}
    best = front(record)
    top = 22.0 * len(heading) + 26
    layout = _layout(record, quantity, w - 14, top, h)
    names = _names(record, layout, quantity, sorted(layout.at, key=lambda i: (i not in best, layout.at[i])), w)
    keys = Markup("")
    if len(layout.at) > _LABELLED or any(placed is None for _, _, placed in names):
        # not every mark can carry its name: a legend tells the methods, and the front alone is named
        keys, height = legend([*series], 2, w - 2, top - 26)
        layout = _layout(record, quantity, w - 14, top + height, h)
        names = _names(record, layout, quantity, sorted(best, key=lambda i: layout.at[i]), w)

    parts: list[Markup] = [
        label(fit(text, w - 4, 15 if k == 0 else SMALL), 2, 12 + 20 * k, class_="head" if k == 0 else "soft")
        for k, text in enumerate(heading)
    ]
    parts += [
        keys,
        frame(layout.x, layout.y, layout.bottom),
        *_surroundings(layout, quantity),
        _staircase(layout, best),
    ]
    for i in sorted(layout.at, key=lambda i: (i in best, i)):  # the front on top
        px, py = layout.at[i]
        if i not in layout.on:
            up = i in layout.above
            d = (
                f"M{px - 12:.2f} {py + 3.5:.2f}v-7m-3 3l3 -3l3 3"
                if up
                else f"M{px - 12:.2f} {py - 3.5:.2f}v7m-3 -3l3 3l3 -3"
            )
            parts.append(tag("path", d=d, class_="arrow"))
        row = record.rows[i]
        parts.append(marker(series[row.method], px, py, title=_tip(row), class_="front" if i in best else ""))
    for i, text, placed in names:
        if placed is None:
            continue
        if placed.leader is not None:
            (x0, y0), (x1, y1) = placed.leader
            parts.append(tag("line", x1=x0, y1=y0, x2=x1, y2=y1, class_="leader"))
        middle = (placed.box.y0 + placed.box.y1) / 2
        parts.append(label(text, placed.box.x0, middle, class_="label best" if i in best else "label"))
    title = f"{record.model}: {quantity.title} against bits per weight"
    return Sketch(w, layout.bottom + 44, title, _describe(record, quantity, layout, best), tuple(parts))


def _surroundings(layout: _Layout, quantity: Quantity) -> list[Markup]:
    """Titles, the float line, and the borders of what is off scale."""
    x, y = layout.x, layout.y
    parts = titles(x, layout.bottom, layout.top, "bits per weight, every stored byte counted", quantity.title)
    if layout.band:
        edge = layout.top + layout.band - 5
        parts.append(tag("line", x1=x.start, x2=x.end, y1=edge, y2=edge, class_="break"))
        parts.append(label("off scale", x.start - 6, layout.top + layout.band / 2 - 6, "end", "tick"))
    if layout.foot:
        parts.append(label("at float", x.start - 6, layout.bottom - _LANE / 2, "end", "tick"))
    if quantity.reference is not None:
        level = y(quantity.reference)
        parts.append(tag("line", x1=x.start, x2=x.end, y1=level, y2=level, class_="float"))
        parts.append(label(_float_text(quantity), x.start + 4, level + 9, class_="soft"))
    if not layout.at:
        parts.append(
            label("no rows to draw", (x.start + x.end) / 2, (layout.top + layout.bottom) / 2, "middle", "soft")
        )
    return parts


def _float_text(quantity: Quantity) -> str:
    return f"float {numbers.perplexity(quantity.reference)}"


def _staircase(layout: _Layout, best: set[int]) -> Markup:
    """The front as steps: on to the right edge, and down from the band above where it begins there."""
    points = sorted(layout.at[i] for i in layout.on if i in best)
    if not points:
        return Markup("")
    (x0, y0), rest = points[0], points[1:]
    d = f"M{x0:.2f} {layout.y.end:.2f}V{y0:.2f}" if any(i in best for i in layout.above) else f"M{x0:.2f} {y0:.2f}"
    d += "".join(f"H{px:.2f}V{py:.2f}" for px, py in rest)
    return tag("path", d=d + f"H{layout.x.end:.2f}", class_="steps")


def _names(
    record: CompareRecord, layout: _Layout, quantity: Quantity, wanted: Sequence[int], w: float
) -> list[tuple[int, str, Placed | None]]:
    """The names of the rows ``wanted`` beside their marks, off-scale ones with their value; None where none fits."""
    texts = []
    for i in wanted:
        name = fit(clean(record.short_name(record.rows[i])), 150, SMALL)
        texts.append(name if i in layout.on else f"{name} {_off_scale(record.rows[i], quantity)}")
    blocked = [box_of(px, py, 6) for px, py in layout.at.values()]
    blocked += [Box(px - 16, py - 6, px, py + 6) for i, (px, py) in layout.at.items() if i not in layout.on]  # arrows
    if quantity.reference is not None:
        level = layout.y(quantity.reference)
        text = _float_text(quantity)
        blocked.append(Box(layout.x.start, level - 1, layout.x.start + 8 + width(text, SMALL), level + 17))
    # bold names are a little wider
    wishes = [Label(*layout.at[i], 1.08 * width(text, SMALL), 13) for i, text in zip(wanted, texts, strict=True)]
    room = Box(layout.x.start + 2, layout.top - 4, w - 1, layout.bottom - 1)
    return list(zip(wanted, texts, place(wishes, blocked, room, 1.0), strict=True))


def _off_scale(row: Row, quantity: Quantity) -> str:
    value = quantity.of(row)
    return numbers.perplexity(row.perplexity) if value is None or not math.isfinite(value) else quantity.show(value)


def _tip(row: Row) -> str:
    over = f" ({numbers.percent(row.excess_percent)})" if row.excess_percent is not None else ""
    where = f"{numbers.bits(row.bits_per_weight)} bits per weight"
    return f"{row.title}: perplexity {numbers.perplexity(row.perplexity)}{over} at {where}"


def _describe(record: CompareRecord, quantity: Quantity, layout: _Layout, best: set[int]) -> str:
    """The plot in words, for those who do not see it."""
    rows = record.rows
    told = [f"{len(rows)} rows; float perplexity {numbers.perplexity(record.float_perplexity)}."]
    if best:
        ordered = [rows[i] for i in sorted(best, key=lambda i: rows[i].bits_per_weight or 0.0)]
        steps = (f"{r.method} {numbers.bits(r.bits_per_weight)} bits {quantity.show(quantity.of(r))}" for r in ordered)
        told.append("Pareto front: " + "; ".join(steps) + ".")
    if layout.above:
        told.append(f"{len(layout.above)} off scale.")
    if len(layout.at) < len(rows):
        told.append(f"{len(rows) - len(layout.at)} not drawn (failed, or bits unknown).")
    return " ".join(told)
