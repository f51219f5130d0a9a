"""The figures of softmax for docs/special.md: tables and a plot, drawn from the record of benchmarks/softmax.py."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from dither.report import numbers, palette
from dither.report.axes import Axis, log_domain
from dither.report.frame import frame, legend, marker, titles
from dither.report.style import plot_style
from dither.report.svg import label, picture, tag

Record = Mapping[str, Any]
NAMES = ("two_pass", "recompute", "reload", "online", "torch")
_MARGIN = 14.0


def softmax_tables(record: Record) -> str:
    """What was measured, a table a part, under the plot; parts that are missing are left out."""
    parts = ["![ns a number against the length of a row](softmax.svg)\n"] if "float32" in record else []
    for name in ("float32", "bfloat16"):
        if name in record:
            parts.append(_times(name, record[name]))
    if "errors" in record:
        parts.append(_errors(record["errors"]))
    if "use" in record:
        parts.append(_use(record["use"]))
    return "\n".join(parts)


def _times(name: str, part: Record) -> str:
    lines = [
        f"ns a number, {name} (caches: {', '.join(_size(size) for size in part['caches'])}):\n",
        "| row | kernels | threads | two_pass | recompute | reload | online | torch | over three passes | over torch | GB/s | of a copy's | auto |",
        "|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for row in part["rows"]:
        seconds, rate = row["seconds"], row["bytes_a_second"]["two_pass"]
        times = " | ".join(f"{1e9 * seconds[n] / row['numbers']:.3f}" for n in NAMES)
        three, copying = min(seconds["recompute"], seconds["reload"]), 2 * row["bytes"] / row["streams"]["copy"]
        ratios = f"{three / seconds['two_pass']:.2f} | {seconds['torch'] / seconds['two_pass']:.2f} | {rate / 1e9:.1f} | {rate / copying:.2f}"
        lines.append(f"| {_size(row['bytes'])} | {row['isa']} | {row['threads']} | {times} | {ratios} | {row['auto']} |")
    return "\n".join([*lines, "", where_measured(part), ""])


def _errors(part: Record) -> str:
    kinds = list(part["rows"][0]["ulp"])
    lines = ["Largest error against float64, in units of the last place:\n", f"| kernels | algorithm | {' | '.join(kinds)} |"]
    lines.append("|---|---|" + "--:|" * len(kinds))
    for row in part["rows"]:
        lines.append(f"| {row['isa']} | {row['algorithm']} | " + " | ".join(f"{row['ulp'][kind]:.2f}" for kind in kinds) + " |")
    return "\n".join([*lines, "", where_measured(part), ""])


def _use(part: Record) -> str:
    lines = ["| work | threads | torch | dither | times faster | |", "|---|--:|--:|--:|--:|---|"]
    for row in part["rows"]:
        ours = f"{1e6 * row['ours']:,.1f} us | {row['times_faster']:.2f}" if "ours" in row else f"{numbers.NOTHING} | {numbers.NOTHING}"
        lines.append(f"| {row['work']} | {row['threads']} | {1e6 * row['torch']:,.1f} us | {ours} | {row['state']} |")
    return "\n".join([*lines, "", where_measured(part), ""])


def where_measured(part: Record) -> str:
    """On which machine, with which versions, when."""
    machine = part["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return f"Measured on {machine['cpu']} ({versions}) on {part['date'][:10]}."


def _size(size: int) -> str:
    """``4 KiB``: the largest unit that divides."""
    for unit, shift in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size and size % (1 << shift) == 0:
            return f"{size >> shift} {unit}"
    return f"{size} B"


def softmax_svg(record: Record) -> str:
    """ns a number against the length of a row, one thread, the first instruction set of the record; with a background of its own."""
    rows = [row for row in record["float32"]["rows"] if row["threads"] == 1]
    rows = [row for row in rows if row["isa"] == rows[0]["isa"]]
    width, height = 760.0, 350.0
    heading = label(f"softmax of one float32 row, one thread, {rows[0]['isa']}", 2, 10, class_="label")
    keys, used = legend(NAMES, 2, width, 22)
    top, bottom = 22 + used + 26, 22 + used + 26 + height
    x = Axis(math.log2(rows[0]["bytes"]) - 0.5, math.log2(rows[-1]["bytes"]) + 0.5, 58, width)
    values = {name: [1e9 * row["seconds"][name] / row["numbers"] for row in rows] for name in NAMES}
    y = Axis(*log_domain([v for column in values.values() for v in column], 2.0), bottom, top, log=True)
    lines = [_line(i, name, [x(math.log2(row["bytes"])) for row in rows], values[name], y, rows) for i, name in enumerate(NAMES)]
    steps = [label(_size(row["bytes"]), x(math.log2(row["bytes"])), bottom + 13, "middle", "tick") for row in rows]
    about = titles(x, bottom, top, "bytes of the row (log scale)", "ns a number (log scale)")
    edge = _MARGIN - 1
    card = tag("rect", x=-edge, y=-edge, width=width + 2 * edge, height=bottom + 44 + 2 * edge, rx=8, fill="var(--bg)", stroke="var(--line)")
    parts = (tag("style", Markup(plot_style())), card, heading, keys, frame(x, y, bottom, []), *steps, *about, *lines)
    said = "; ".join(f"{name} from {values[name][0]:.2f} to {values[name][-1]:.2f}" for name in NAMES)
    title = "Softmax: time a number against the length of the row"
    return picture(width, bottom + 44, title, f"ns a number, shortest to longest row: {said}", "softmax", *parts, margin=_MARGIN) + "\n"


def _line(series: int, name: str, xs: Sequence[float], values: Sequence[float], y: Axis, rows: Sequence[Record]) -> Markup:
    points = [(at, y(value)) for at, value in zip(xs, values, strict=True)]
    path = "M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in points)
    colour = f"var(--s{series % palette.COLOURS})"
    marks = [
        marker(series, px, py, f"{name}, {_size(row['bytes'])}: {value:.3f} ns", r=4.0)
        for (px, py), value, row in zip(points, values, rows, strict=True)
    ]
    return Markup("").join((tag("path", d=path, fill="none", stroke=colour, stroke_width=1.5), *marks))
