"""Sparse Walsh-Hadamard transforms: success, samples and time against K, N and noise, and where they overtake the full transform.

    python benchmarks/spright.py [--threads 2] [--quick] [--out benchmarks/records/spright.json]

Signals have K coefficients of +-1 at uniformly random places. Parts of the record:

    noise       n = 20, K = 100: exact supports, recall, samples and seconds against SNR, for every mode
    phase       n = 18, 128 bins a group: exact supports against K / B; three hashes peel up to K / B = 2.46 where K is large
    length      K = 32, n = 12 .. 40: samples and seconds against n; and the full transform's, whose work doubles with each bit
    sparsity    n = 24, K = 16 .. 10^4: samples and seconds against K
    least       the fewest samples, over bins and offsets, with which 9 of 10 supports are exact, against n and K, without noise and at 5 dB:
                the exponents of samples = c K^a n^b with 95 % intervals
    crossover   a table of 2^n values in memory: seconds of the sparse transforms and of the full one, which takes n 2^n additions and, above
                the caches, two passes over 8 2^n bytes

Limits: samples cannot be fewer than K; a full transform needs all 2^n. Times are wall times of single calls, medians over signals, the function's
own cost (a look-up, or K parities a sample in `length`) within.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dither.claims.spright_peers import Sampled, Signal, signal
from dither.quant.machine import machine
from dither.special import SparseWHT, fwht_, sparse_wht
from dither.special.spright.detect import MODES

RECORD = Path(__file__).parent / "records" / "spright.json"
T_95 = {4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228, 11: 2.201, 12: 2.179, 13: 2.160, 14: 2.145, 15: 2.131}

Row = dict[str, Any]


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    result = run()
    return result, time.perf_counter() - started


def solve(s: Signal, k: int, mode: str, seed: int, **given: Any) -> tuple[SparseWHT, float]:
    return timed(lambda: sparse_wht(s.f, k=k, sigma=s.sigma, mode=mode, seed=seed, **given))


def summary(found: list[tuple[bool, float, float, float]]) -> Row:
    """Of exact, recall, samples, seconds over signals."""
    exact, recall, samples, seconds = zip(*found, strict=True)
    return {
        "signals": len(found), "exact": statistics.fmean(exact), "recall": statistics.fmean(recall), "samples": statistics.fmean(samples),
        "seconds": statistics.median(seconds),
    }  # fmt: skip


def over_signals(n: int, k: int, snr: float | None, mode: str, runs: int, bins_for: int | None = None, **given: Any) -> Row:
    found = []
    for seed in range(runs):
        s = signal(n, k, snr, seed)
        x, seconds = solve(s, bins_for or k, mode, seed, **given)
        found.append((s.exact(x.support), s.recall(x.support), x.n_queries, seconds))
    return summary(found) | {"n": n, "k": k, "snr": snr, "mode": mode, "bins": x.bins, "share": found[0][2] / (1 << n)}


def noise(runs: int) -> list[Row]:
    levels: tuple[float | None, ...] = (-6.0, -3.0, 0.0, 5.0, 10.0, 20.0, None)
    rows = []
    for mode in (m for m in MODES if m != "low_degree"):  # these supports have any degree
        for snr in levels:
            if mode != "noiseless" or snr is None:
                rows.append(over_signals(20, 100, snr, mode, min(runs, 5) if mode == "ml" else runs))
    return rows


def phase(runs: int) -> list[Row]:
    loads = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 3.0)
    return [
        over_signals(18, int(128 * load), None if mode == "noiseless" else 10.0 + 10 * math.log10(load), mode, runs, bins_for=128)
        | {"load": load}
        for mode, load in itertools.product(("noiseless", "nso", "so"), loads)
    ]  # the noise of a bin against one coefficient is the same at all loads


def length(runs: int, lengths: tuple[int, ...]) -> list[Row]:
    rows = []
    for mode, n in itertools.product(("noiseless", "nso", "so"), lengths):
        found = []
        for seed in range(runs):
            f = Sampled(n, 32, None if mode == "noiseless" else 10.0, seed)
            x, seconds = timed(lambda f=f, n=n, mode=mode, seed=seed: sparse_wht(f, n, 32, f.sigma, mode, seed, eta=2.0))
            found.append((f.exact(x), f.recall(x), x.n_queries, seconds))
        rows.append(summary(found) | {"n": n, "k": 32, "mode": mode})
    return rows


def sparsity(runs: int, n: int, counts: tuple[int, ...]) -> list[Row]:
    return [over_signals(n, k, None if mode == "noiseless" else 10.0, mode, runs) for mode in ("noiseless", "so") for k in counts]


def least(runs: int, lengths: tuple[int, ...], counts: tuple[int, ...]) -> tuple[list[Row], list[Row]]:
    """The cells, and the fit of each mode."""
    cells, fits = [], []
    for mode, snr in (("noiseless", None), ("so", 5.0)):
        for n, k in itertools.product(lengths, counts):
            for bins, p1 in sorted(_grid(k, mode), key=lambda c: c[0] * ((c[1] + 2 * (n + 6)) if mode == "so" else n + 1)):
                row = _enough(n, k, snr, mode, runs, bins, p1)
                if row is not None:
                    cells.append(row)
                    break
        fits.append({"mode": mode, "snr": snr} | fit([c for c in cells if c["mode"] == mode]))
    return cells, fits


def _grid(k: int, mode: str) -> list[tuple[int, int | None]]:
    """Bins and offsets to choose from."""
    first = max(1, math.ceil(math.log2(k)) - 1)
    return list(itertools.product([1 << b for b in range(first, first + 3)], (2, 4, 8, 16) if mode == "so" else (None,)))


def _enough(n: int, k: int, snr: float | None, mode: str, runs: int, bins: int, p1: int | None) -> Row | None:
    """The row of a configuration in which 9 of 10 supports are exact; None as soon as it cannot be."""
    wrong, samples = 0, 0.0
    for seed in range(runs):
        s = signal(n, k, snr, seed)
        x, _ = solve(s, bins, mode, seed, p1=p1)
        wrong += not s.exact(x.support)
        samples += x.n_queries / runs
        if wrong > runs // 10:
            return None
    return {"n": n, "k": k, "mode": mode, "snr": snr, "bins": x.bins, "p1": p1, "samples": samples, "signals": runs}


def fit(cells: list[Row]) -> Row:
    """log samples = log c + a log K + b log n, by least squares, with 95 % intervals of a and b."""
    design = np.array([[1, math.log(c["k"]), math.log(c["n"])] for c in cells])
    y = np.log([c["samples"] for c in cells])
    found, *_ = np.linalg.lstsq(design, y, rcond=None)
    rest = y - design @ found
    freedom = len(y) - 3
    spread = np.sqrt(np.diag(np.linalg.inv(design.T @ design)) * (rest @ rest) / freedom) * T_95.get(freedom, 1.96)
    a, b = ({"exponent": found[i], "low": found[i] - spread[i], "high": found[i] + spread[i]} for i in (1, 2))
    return {"constant": math.exp(found[0]), "k": a, "n": b, "cells": len(cells)}


def crossover(runs: int, lengths: tuple[int, ...]) -> list[Row]:
    rows = []
    for n in lengths:
        s = signal(n, 100, 10.0, 0)
        seconds = {mode: statistics.median(solve(s, 100, mode, seed)[1] for seed in range(runs)) for mode in ("nso", "so")}
        s = signal(n, 100, None, 0)
        seconds["noiseless"] = statistics.median(solve(s, 100, "noiseless", seed)[1] for seed in range(runs))
        f = s.f
        full = statistics.median(timed(lambda f=f: fwht_(f, True))[1] for _ in range(max(3, runs)))
        rows.append({"n": n, "k": 100, "full_seconds": full, "seconds": seconds, "times_faster": {m: full / t for m, t in seconds.items()}})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="fewer signals, shorter vectors: under a minute")
    parser.add_argument("--out", type=Path, default=RECORD, help="where the record goes")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    quick, runs = given.quick, 5 if given.quick else 20
    record: Row = machine() | {"threads": given.threads, "quick": quick}
    signal(12, 8, 10.0, 0)  # what is loaded once
    parts: dict[str, Callable[[], Any]] = {
        "noise": lambda: noise(runs),
        "phase": lambda: phase(runs),
        "length": lambda: length(3 if quick else 10, (12, 20, 28, 40) if quick else tuple(range(12, 41, 4))),
        "sparsity": lambda: sparsity(2 if quick else 5, 20 if quick else 24, (16, 64, 256, 1024) if quick else (16, 64, 256, 1024, 4096, 10000)),
        "least": lambda: least(10 if quick else 20, (12, 14, 16) if quick else (16, 18, 20, 22), (16, 32, 64) if quick else (64, 128, 256, 512)),
        "crossover": lambda: crossover(3 if quick else 5, (12, 16, 20, 22) if quick else tuple(range(14, 27, 2))),
    }
    for name, part in parts.items():
        found, seconds = timed(part)
        if name == "least":
            record["least"], record["exponents"] = found
        else:
            record[name] = found
        print(f"{name}: {seconds:.1f} s", flush=True)
        show(name, record)
    given.out.parent.mkdir(exist_ok=True, parents=True)
    given.out.write_text(json.dumps(record, indent=1) + "\n")
    print(given.out)


def show(name: str, record: Row) -> None:
    for row in record["exponents" if name == "least" else name]:
        if name == "least":
            said = [f"{name}^{e['exponent']:.2f} [{e['low']:.2f}, {e['high']:.2f}]" for name, e in (("K", row["k"]), ("n", row["n"]))]
            print(f"  {row['mode']}: samples ~ {' '.join(said)}")
        elif name == "crossover":
            ratios = ", ".join(f"{m} {r:.2f}" for m, r in row["times_faster"].items())
            print(f"  n = {row['n']}: full {row['full_seconds'] * 1e3:.2f} ms; times faster: {ratios}")
        else:
            snr = "" if row.get("snr") is None else f" at {row['snr']:.1f} dB"
            print(f"  {row['mode']:<9} n = {row['n']}, K = {row['k']}{snr}: exact {row['exact']:.2f}, recall {row['recall']:.3f}, "
                  f"{row['samples']:.0f} samples ({100 * row['samples'] / (1 << row['n']):.2g} %), {row['seconds'] * 1e3:.1f} ms")  # fmt: skip


if __name__ == "__main__":
    main()
