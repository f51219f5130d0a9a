"""Outliers of a float model, layer by layer: how far the largest input channel stands out, and how heavy the tails
are.

Layers that read one tensor have the same statistics of inputs and share a mark, named after all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from markupsafe import Markup

from dither.report import numbers
from dither.report.axes import Axis, linear_domain, log_domain
from dither.report.frame import frame, legend, marker, titles
from dither.report.layers import block_columns
from dither.report.records import InspectLayer, InspectRecord, role
from dither.report.svg import Drawing, label, picture, tag
from dither.report.ticks import integer_ticks

_MOST_SERIES = 12  # kinds of layers with a mark of their own; the rest shares the last


@dataclass(frozen=True)
class Statistic:
    """What the y axis shows. ``normal`` is the value of well-behaved data, drawn as a line."""

    title: str
    of: Callable[[InspectLayer], float | None]
    normal: float
    means: str


STATISTICS = (
    Statistic(
        "largest input channel over the median channel", lambda layer: layer.input_max_over_median, 1.0, "no outliers"
    ),
    Statistic("kurtosis of the inputs", lambda layer: layer.input_kurtosis, 3.0, "Gaussian"),
    Statistic("kurtosis of the weights", lambda layer: layer.weight_kurtosis, 3.0, "Gaussian"),
)


def outliers(record: InspectRecord, statistic: Statistic, uid: str) -> Drawing | None:
    """The statistic of every layer over the blocks, on a log axis; None where no layer has it."""
    series = _series(record, statistic)
    if not series:
        return None
    return Drawing(
        _draw(record, statistic, series, 760, 300, f"{uid}w"), _draw(record, statistic, series, 340, 320, f"{uid}n")
    )


def _series(record: InspectRecord, statistic: Statistic) -> dict[str, dict[int | None, float]]:
    """Values by kind of layer and block; kinds with the same values are merged under a joint name."""
    table: dict[str, dict[int | None, float]] = {}
    for layer in record.layers:
        value = statistic.of(layer)
        if value is not None and math.isfinite(value) and value > 0:
            name = "outside" if layer.block is None else role(layer.name, layer.block)
            known = table.setdefault(name, {})
            known[layer.block] = max(known.get(layer.block, 0.0), value)
    merged: dict[tuple[tuple[int | None, float], ...], list[str]] = {}
    for name, known in table.items():
        merged.setdefault(tuple(known.items()), []).append(name)
    series: dict[str, dict[int | None, float]] = {}
    for values, names in merged.items():
        name = ", ".join(names)
        if len(series) >= _MOST_SERIES - 1 and len(merged) > _MOST_SERIES:
            name = "other layers"
        target = series.setdefault(name, {})
        for block, value in values:
            target[block] = max(target.get(block, 0.0), value)
    return series


def _draw(
    record: InspectRecord,
    statistic: Statistic,
    series: dict[str, dict[int | None, float]],
    w: float,
    h: float,
    uid: str,
) -> Markup:
    keys, keys_height = legend([*series], 2, w - 2, 0)
    top, bottom = keys_height + 26, h + keys_height - 46
    inner = [c for c in block_columns(block for known in series.values() for block in known) if c is not None]
    outside = any(None in known for known in series.values())
    x = Axis(*linear_domain(map(float, inner), 1.0, 0.03), 50, w - (40 if outside else 10))
    y = Axis(
        *log_domain([statistic.normal, *(v for known in series.values() for v in known.values())], 4.0),
        bottom,
        top,
        log=True,
    )

    blocks = integer_ticks(inner[0], inner[-1], int((x.end - x.start) / 50)) if inner else []
    parts: list[Markup] = [keys, frame(x, y, bottom, [float(b) for b in blocks])]
    parts += titles(x, bottom, top, "block", f"{statistic.title} (log scale)")
    level = y(statistic.normal)
    parts.append(tag("line", x1=x.start, x2=x.end, y1=level, y2=level, class_="float"))
    parts.append(label(statistic.means, x.end - 2, level - 8, "end", "soft"))
    if outside:
        parts.append(label("outside", w - 2, bottom + 13, "end", "tick"))
    for number, (name, known) in enumerate(series.items()):
        path = [(x(block), y(value)) for block, value in sorted((b, v) for b, v in known.items() if b is not None)]
        if len(path) > 1:
            parts.append(
                tag("path", d="M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in path), class_=f"thread t{number % 7}")
            )
        for block, value in known.items():
            where = "outside of the blocks" if block is None else f"block {block}"
            tip = f"{name}, {where}: {numbers.short(value)}"
            parts.append(marker(number, w - 22 if block is None else x(block), y(value), tip, r=3.6))
    worst = max(((v, name, b) for name, known in series.items() for b, v in known.items()), key=lambda item: item[0])
    told = f"Largest: {numbers.short(worst[0])}, {worst[1]}, " + (
        "outside of the blocks." if worst[2] is None else f"block {worst[2]}."
    )
    return picture(w, h + keys_height, f"{record.model}: {statistic.title}", told, uid, *parts)
