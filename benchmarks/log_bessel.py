"""log I_v and log K_v: accuracy on a grid against ball arithmetic, and speed beside SciPy and mpmath.

    python benchmarks/log_bessel.py [--quick] [--only accuracy|speed] [--out benchmarks/records/log_bessel.json]
    python benchmarks/readme.py --special       the tables and the plot in docs/special.md, from the stored record

Grid: 24,200 pairs (v, x) of each function: the paper's ranges, both sides of every seam between expressions, the curve where log I is 0, and
orders up to 1e6 with x from 1e-300 to 1e8. The exact values are arb's, proved to 25 digits (mpmath with 50 digits agrees on a few of them); an
error is |found - exact| / max(1, |exact|), and that of a ratio relative. Times: pairs drawn uniformly, float64, medians of 5 rounds in which
all alternate; SciPy is log(ive) + x and log(kve) - x, mpmath log(besseli) and log(besselk) at its 15 digits, where it gives a value. Limits:
24 bytes a pair, and the operations of the region, 60 to 700 a pair. --quick takes a tenth of the pairs. --only measures one half and keeps the other
of the record at --out: exact values take minutes on any machine, times some two on a quiet one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dither import kernels
from dither.claims.bessel_oracle import exact, mixed_error, relative_error
from dither.claims.log_bessel import FUNCTIONS, RANGES, draw, seconds, times
from dither.kernels.bessel import REGIONS, log_bessel
from dither.kernels.bessel_reference import classify
from dither.quant.machine import machine
from dither.special.bessel_tables import bessel_tables

ORDERS = (0.3, 0.46, 0.6, 0.7, 3.05, 3.1, 12.7, 30.0, 57.0, 164.0)  # seams of the regions
ARGUMENTS = (1.0, 3.0, 8.0, 19.6931, 30.0, 35.9074, 84.4153, 274.2377, 1400.0)
CELLS, V_DECADES, X_DECADES = 24, (-3, 6), (-4, 8)  # of the plot


def grid(part: float) -> dict[str, tuple[Tensor, Tensor]]:
    """Pairs by set; ``part`` of the whole number."""
    generator = torch.Generator().manual_seed(0)

    def uniform(low: float, high: float, n: int) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=generator, dtype=torch.float64)

    def spread(low: float, high: float, n: int) -> Tensor:
        return uniform(math.log(low), math.log(high), n).exp()

    def beside(edges: Tensor) -> Tensor:
        """On either side of each edge, from the next number to a thousandth away."""
        sign = 2 * torch.randint(0, 2, edges.shape, generator=generator) - 1
        return edges * (1 + sign * spread(2.3e-16, 1e-3, len(edges)))

    sizes = {"0-150": 4000, "small": 4000, "150-1e4": 1000, "log-uniform": 4000}
    sets = {name: draw(name, int(n * part), 1) for name, n in sizes.items()}
    n = int(1600 * part)
    orders, arguments = (torch.tensor(edges, dtype=torch.float64)[torch.arange(n) % len(edges)] for edges in (ORDERS, ARGUMENTS))
    hankel, debye = spread(30, 1e6, n), spread(1400, 1e8, n)
    sets["seams in v"] = beside(orders), spread(1e-3, 2e3, n)
    sets["seams in x"] = spread(1e-3, 200, n), beside(arguments)
    sets["seams in v and x"] = torch.cat([beside((2 * hankel).sqrt()), beside((0.002 * debye).sqrt())]), torch.cat([hankel, debye])
    # log I_v(x) = 0 near x = 0.6627 v
    v = spread(3, 1e6, n)
    sets["log I near 0"] = v, 0.6627 * v * (1 + 0.02 * uniform(-1, 1, n))
    sets["wide"] = spread(1e-8, 1e6, n), spread(1e-300, 1e8, n)
    sets["large"] = spread(1e4, 1e6, n), spread(1e4, 1e8, n)
    return sets


def summary(errors: Tensor) -> dict[str, float]:
    return {"maximum": errors.max().item(), "median": errors.median().item(), "quantile_999": errors.quantile(0.999).item()}


def accuracy(part: float) -> dict[str, Any]:
    """Errors by function: over all pairs, by set, by region, by cell of the plot."""
    sets = grid(part)
    v, x = (torch.cat(column) for column in zip(*sets.values(), strict=True))
    regions = classify(v, x)
    which = torch.repeat_interleave(torch.arange(len(sets)), torch.tensor([len(pair[0]) for pair in sets.values()]))
    found: dict[str, Any] = {"points": len(v), "cells": {"number": CELLS, "v_decades": V_DECADES, "x_decades": X_DECADES}}
    for kind in FUNCTIONS:
        values = log_bessel(kind, v, x, bessel_tables(), ratio=True)
        assert values.ratio is not None
        columns = zip(v.tolist(), x.tolist(), values.value.tolist(), values.ratio.tolist(), strict=True)
        both = [(exact(kind, a, b), value, ratio) for a, b, value, ratio in columns]
        errors = torch.tensor([mixed_error(value, log) for (log, _), value, _ in both], dtype=torch.float64)
        # where x is tiny, ratios of K are as uncertain as v log x
        ratios = torch.tensor([relative_error(ratio, quotient) for (_, quotient), _, ratio in both], dtype=torch.float64)[x > 1e-100]
        row, column = (
            ((s.log10() - low) / (high - low) * CELLS).floor().long() for s, (low, high) in ((v, V_DECADES), (x, X_DECADES))
        )
        inside = (row >= 0) & (row < CELLS) & (column >= 0) & (column < CELLS)
        cells = torch.zeros(CELLS * CELLS, dtype=torch.float64).scatter_reduce_(0, (row * CELLS + column)[inside], errors[inside], "amax")
        found["cells"][kind] = [float(f"{value:.1e}") for value in cells.tolist()]
        found[kind] = summary(errors) | {
            "finite": bool(values.value.isfinite().all()), "ratio": summary(ratios),
            "sets": {name: summary(errors[which == i]) | {"points": int((which == i).sum())} for i, name in enumerate(sets)},
            "regions": {REGIONS[c]: summary(errors[regions == c]) | {"points": int((regions == c).sum())} for c in sorted(set(regions.tolist()))},
        }  # fmt: skip
        f = found[kind]
        print(f"log {kind}: {len(v):,} pairs, maximum error {f['maximum']:.1e}, 99.9 % {f['quantile_999']:.1e}, median {f['median']:.1e}; ratio "
              f"{f['ratio']['maximum']:.1e}", flush=True)  # fmt: skip
    return found


def against_mpmath(count: int) -> float:
    """The largest relative difference between arb's values and those of mpmath with 50 digits, on pairs that are quick there."""
    import mpmath

    worst = 0.0
    with mpmath.workdps(50):
        for name in ("small", "0-150"):
            for v, x in zip(*(column.tolist() for column in draw(name, count // 2, 2)), strict=True):
                for kind, bessel in (("I", mpmath.besseli), ("K", mpmath.besselk)):
                    theirs = mpmath.log(bessel(v, x))
                    worst = max(worst, float(abs(mpmath.mpf(exact(kind, v, x)[0].mid().str(30, radius=False)) - theirs) / abs(theirs)))
    print(f"arb and mpmath with 50 digits: {count} pairs, at most {worst:.1e} apart")
    return worst


def mpmath_seconds(kind: str, name: str, count: int) -> tuple[float, float]:
    """Of a pair, and the share of pairs for which mpmath gives a value."""
    import mpmath

    bessel = mpmath.besseli if kind == "I" else mpmath.besselk
    taken = []
    for v, x in zip(*(column.tolist() for column in draw(name, count, 3)), strict=True):
        with contextlib.suppress(mpmath.libmp.NoConvergence, ValueError, ZeroDivisionError):
            taken.append(seconds(lambda v=v, x=x: mpmath.log(bessel(v, x))))
    return (statistics.fmean(taken) if taken else math.inf), len(taken) / count


def speed(mpmath_pairs: int) -> list[dict[str, Any]]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    counts = (1, cores) if cores > 1 else (1,)
    rows = []
    print(f"{'':24} {'ours, 1 core':>13} {f'{cores} cores':>9} {'SciPy':>9} {'mpmath':>10}   times SciPy on 1 and {cores} cores, times mpmath")
    for name in RANGES:
        for kind in FUNCTIONS:
            ours, theirs, finite = times(kind, name, 0, counts)
            slow, given = mpmath_seconds(kind, name, mpmath_pairs)
            row = {
                "function": kind, "range": name, "seconds": ours[1], "seconds_on_all_cores": ours[counts[-1]], "cores": cores,
                "scipy_seconds": theirs, "scipy_finite": finite, "mpmath_seconds": slow, "mpmath_finite": given,
                "times_scipy": theirs / ours[1], "times_scipy_on_all_cores": theirs / ours[counts[-1]], "times_mpmath": slow / ours[1],
                "bytes_a_second": 24 / ours[1],
            }  # fmt: skip
            rows.append(row)
            print(f"log {kind}, {name:17} {ours[1] * 1e9:10.1f} ns {ours[counts[-1]] * 1e9:6.1f} ns {theirs * 1e9:6.0f} ns {slow * 1e6:7.0f} us   "
                  f"{row['times_scipy']:.1f}, {row['times_scipy_on_all_cores']:.1f}, {row['times_mpmath']:,.0f}"
                  f"{'' if finite > 0.999 else f' (of SciPy {100 * finite:.0f} % finite)'}", flush=True)  # fmt: skip
    for which in ("times_scipy", "times_scipy_on_all_cores", "times_mpmath"):
        print(f"{which}: median {statistics.median(row[which] for row in rows):,.1f}, maximum {max(row[which] for row in rows):,.1f}")
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the pairs")
    parser.add_argument("--only", choices=("accuracy", "speed"), help="this half alone")
    parser.add_argument("--out", type=Path, help="write the record here")
    given = parser.parse_args(arguments)
    if given.only and given.out is None:
        parser.error("--only: needs --out, a record to change")
    print(f"kernels: {kernels.backend()}")
    record: dict[str, Any] = json.loads(given.out.read_text(encoding="utf-8")) if given.only and given.out.is_file() else {}
    record |= machine() | {"kernels": kernels.backend(), "numpy": np.__version__}
    if given.only != "accuracy":
        record["speed"] = speed(5 if given.quick else 40)
    if given.only != "speed":
        record |= {"against_mpmath": against_mpmath(10 if given.quick else 60), "accuracy": accuracy(0.1 if given.quick else 1.0)}
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
