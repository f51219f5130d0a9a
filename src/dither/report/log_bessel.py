"""The figures of log I_v and log K_v for docs/special.md: tables and a plot, from the records of benchmarks/log_bessel.py, log_bessel_gpu.py and
von_mises_fisher.py."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from typing import Any

from dither.report.svg import label, picture, tag

Record = Mapping[str, Any]
SUMMARIES: tuple[tuple[str, Callable[[list[float]], float]], ...] = (("median", statistics.median), ("maximum", max))
_SIZE, _LEFT, _TOP, _GAP = 11, 46, 46, 60  # of a cell; of the plot's edges
_DARK = (20, 50, 110)


def log_bessel_tables(record: Record) -> str:
    """Accuracy over all pairs and by set, and times beside SciPy and mpmath, under the plot."""
    found = record["accuracy"]
    lines = [
        "![Largest error by x and v](log_bessel.svg)\n",
        f"Errors on {found['points']:,} pairs, relative to max(1, |value|), against values that are proved to 25 digits:\n",
        "| | maximum | 99.9 % | median | ratio to the next order: maximum | median |\n|---|--:|--:|--:|--:|--:|",
    ]
    for kind, name in (("I", "log I_v"), ("K", "log K_v")):
        f, r = found[kind], found[kind]["ratio"]
        lines.append(f"| {name} | {f['maximum']:.1e} | {f['quantile_999']:.1e} | {f['median']:.1e} | {r['maximum']:.1e} | {r['median']:.1e} |")
    lines.append("\n| pairs | number | log I_v: maximum | median | log K_v: maximum | median |\n|---|--:|--:|--:|--:|--:|")
    for name, i in found["I"]["sets"].items():
        k = found["K"]["sets"][name]
        lines.append(f"| {name} | {i['points']:,} | {i['maximum']:.1e} | {i['median']:.1e} | {k['maximum']:.1e} | {k['median']:.1e} |")
    return "\n".join([*lines, "", *_times(record), "", f"Measured by `python benchmarks/log_bessel.py` {_where(record)}.", ""])


def _times(record: Record) -> list[str]:
    rows = record["speed"]
    cores = rows[0]["cores"]
    lines = [
        f"Times a pair ({record['kernels']}; SciPy and mpmath run on one core, with the share of pairs for which they give a finite value):\n",
        f"| | ours | ours, {cores} cores | SciPy | finite | mpmath | finite | times SciPy | on {cores} cores | times mpmath |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        ours = f"{row['seconds'] * 1e9:.1f} ns | {row['seconds_on_all_cores'] * 1e9:.1f} ns"
        scipy = f"{row['scipy_seconds'] * 1e9:.0f} ns | {100 * row['scipy_finite']:.0f} %"
        mpmath = f"{row['mpmath_seconds'] * 1e6:.0f} us | {100 * row['mpmath_finite']:.0f} %"
        gains = f"{row['times_scipy']:.1f} | {row['times_scipy_on_all_cores']:.1f} | {row['times_mpmath']:,.0f}"
        lines.append(f"| log {row['function']}, {row['range']} | {ours} | {scipy} | {mpmath} | {gains} |")
    for name, choose in SUMMARIES:
        gains_of = [choose([row[which] for row in rows]) for which in ("times_scipy", "times_scipy_on_all_cores", "times_mpmath")]
        lines.append(f"| {name} | | | | | | | {gains_of[0]:.1f} | {gains_of[1]:.1f} | {gains_of[2]:,.0f} |")
    return lines


def log_bessel_gpu_tables(record: Record) -> str:
    """Agreement with the CPU and throughput on a CUDA device."""
    agreed = record["agreement"]
    lines = [
        f"On {record['device']}, {agreed['points']:,} pairs differ from the {record['cpu_path']} path of its machine by at most "
        f"{agreed['I']['maximum']:.1e} (log I_v) and {agreed['K']['maximum']:.1e} (log K_v), relative to max(1, |value|).\n",
        f"| | pairs | million a second | times its CPU ({record['cpu_threads']} threads) | sorting by region, times faster |\n|---|--:|--:|--:|--:|",
    ]
    for row in record["rows"]:
        sorting = "" if row["times_unsorted"] is None else f"{row['times_unsorted']:.2f}"
        rate = f"{row['points_a_second'] / 1e6:,.0f} | {row['times_cpu']:.1f}"
        lines.append(f"| log {row['function']}, {row['range']} | {row['points']:,} | {rate} | {sorting} |")
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return "\n".join([*lines, "", f"Measured by `python benchmarks/log_bessel_gpu.py` on {record['date'][:10]} ({versions}).", ""])


def von_mises_fisher_tables(record: Record) -> str:
    """Fits of features, and what SciPy makes of the same rows."""
    lines = [
        "| p | samples | concentration | marginal | 95 % | log likelihood a sample | maximum on a grid | SciPy's | its log likelihood |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in record["rows"]:
        low, high = row["interval_95"]
        ours = f"{row['concentration']:,.0f} | {row['marginal_concentration']:,.0f} | {low:,.0f} .. {high:,.0f}"
        peak = f"{row['log_likelihood_a_sample']:,.1f} | at {row['grid_maximum_over_estimate']:.2f} of it"
        likelihood = row["scipy_log_likelihood_a_sample"]
        theirs = f"{row['scipy_concentration']:.2g} | {'not finite' if likelihood is None else f'{likelihood:,.1f}'}"
        lines.append(f"| {row['dimension']:,} | {row['samples']:,} | {ours} | {peak} | {theirs} |")
    return "\n".join([*lines, "", f"Measured by `python benchmarks/von_mises_fisher.py` {_where(record)}.", ""])


def _where(record: Record) -> str:
    machine = record["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return f"on {machine['cpu']} on {record['date'][:10]} ({versions})"


def log_bessel_svg(record: Record) -> str:
    """The largest error in each cell of the (x, v) plane, both functions, from white (below 1e-16) to dark (1e-14)."""
    plane = record["accuracy"]["cells"]
    cells, (v_low, v_high), (x_low, x_high) = plane["number"], plane["v_decades"], plane["x_decades"]
    side = cells * _SIZE
    parts = [tag("style", "text { font: 12px sans-serif; fill: #333 }"), tag("rect", width="100%", height="100%", fill="#fff")]
    for panel, kind in enumerate(("I", "K")):
        left, bottom = _LEFT + panel * (side + _GAP), _TOP + side
        parts.append(label(f"log {kind}: largest error by x (across) and v (up)", left, _TOP - 14))
        for i, value in enumerate(plane[kind]):
            row, column = divmod(i, cells)
            x, y = left + column * _SIZE, _TOP + (cells - 1 - row) * _SIZE
            parts.append(tag("rect", x=x, y=y, width=_SIZE - 1, height=_SIZE - 1, fill=_colour(value)))
        for decade in range(x_low, x_high + 1, 4):
            parts.append(label(f"1e{decade}", left + (decade - x_low) / (x_high - x_low) * side, bottom + 12, "middle"))
        for decade in range(v_low, v_high + 1, 3):
            parts.append(label(f"1e{decade}", left - 4, bottom - (decade - v_low) / (v_high - v_low) * side, "end"))
    height, width = _TOP + side + 40, _LEFT + 2 * side + _GAP + 20
    parts.append(label("white: below 1e-16, or no pair; dark: 1e-14", _LEFT, height - 10))
    worst = {kind: max(plane[kind]) for kind in ("I", "K")}
    told = f"Largest error by x and v; in any cell at most {worst['I']:.1e} of log I and {worst['K']:.1e} of log K."
    return str(picture(width, height, "Errors of log I and log K", told, "log-bessel", *parts)) + "\n"


def _colour(error: float) -> str:
    shade = min(max((math.log10(max(error, 1e-30)) + 16) / 2, 0.0), 1.0)
    return "#{:02x}{:02x}{:02x}".format(*(round(255 - shade * (255 - dark)) for dark in _DARK))
