"""Logarithms of Bessel functions (arXiv 2409.08729): machine precision without under- or overflow, many times faster than the libraries that have it
or fail, and von Mises-Fisher fits in tens of thousands of dimensions."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dither.claims.claim import Claim, Figures, Say, Test
from dither.errors import UsageError
from dither.kernels.bessel import REGIONS
from dither.special import VonMisesFisher, log_iv, log_kv
from dither.special.bessel_regions import regions_of

POINTS = 500  # of a set, for accuracy
TIMED = 1_000_000  # pairs of ours, a tenth of SciPy's
FUNCTIONS: dict[str, Callable[..., Any]] = {"I": log_iv, "K": log_kv}
DIMENSIONS, CONCENTRATIONS, SAMPLES = (2048, 8192, 32768), (500.0, 5e3, 5e4), 1000
RANGES = {  # of v and of x
    "0-150": ((0.0, 150.0), (0.0, 150.0)),
    "small": ((0.0, 20.0), (0.0, 30.0)),
    "150-1e4": ((150.0, 1e4), (150.0, 1e4)),
    "log-uniform": ((1e-3, 1e4), (1e-4, 2e4)),
}


def draw(name: str, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """``(v, x)``, each ``[n]`` float64, from a range of the paper's."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for low, high in RANGES[name]:
        u = torch.rand(n, generator=generator, dtype=torch.float64)
        made.append(low * (high / low) ** u if name == "log-uniform" else low + (high - low) * u)
    return made[0], made[1]


def errors(kind: str, v: Tensor, x: Tensor, values: Tensor) -> Tensor:
    """``|value - exact| / max(1, |exact|)`` of each pair."""
    from dither.claims.bessel_oracle import exact, mixed_error

    triples = zip(v.tolist(), x.tolist(), values.tolist(), strict=True)
    return torch.tensor([mixed_error(value, exact(kind, a, b)[0]) for a, b, value in triples], dtype=torch.float64)


def scipy_logs(kind: str, v: np.ndarray[Any, Any], x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The usual way: scaled functions, then the logarithm."""
    from scipy.special import ive, kve

    with np.errstate(all="ignore"):
        found: np.ndarray[Any, Any] = np.log(ive(v, x)) + x if kind == "I" else np.log(kve(v, x)) - x
    return found


def seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def times(kind: str, name: str, seed: int, threads: tuple[int, ...]) -> tuple[dict[int, float], float, float]:
    """Seconds a pair of ours by number of threads, and of SciPy; the share of SciPy's values that are finite. Medians of 5 rounds that alternate."""
    v, x = draw(name, TIMED, seed)
    part = slice(0, TIMED // 10)
    few, before = (v[part].numpy(), x[part].numpy()), torch.get_num_threads()
    ours: dict[int, list[float]] = {count: [] for count in threads}
    theirs = []
    try:
        for _ in range(5):
            for count in threads:
                torch.set_num_threads(count)
                ours[count].append(seconds(lambda: FUNCTIONS[kind](v, x, validate=False)) / TIMED)
            theirs.append(seconds(lambda: scipy_logs(kind, *few)) * 10 / TIMED)
    finally:
        torch.set_num_threads(before)
    return {n: statistics.median(t) for n, t in ours.items()}, statistics.median(theirs), float(np.isfinite(scipy_logs(kind, *few)).mean())


def accuracy(seed: int, say: Say) -> Figures:
    figures: Figures = {}
    finite = 1.0
    branches: dict[str, list[float]] = {}
    for name in RANGES:
        v, x = draw(name, POINTS if name != "150-1e4" else POINTS // 4, seed)
        for kind, function in FUNCTIONS.items():
            values = function(v, x)
            finite = min(finite, float(values.isfinite().double().mean()))
            found = errors(kind, v, x, values)
            figures |= {f"median error, {kind}, {name}": found.median().item(), f"maximum error, {kind}, {name}": found.max().item()}
            say(f"  log {kind}, {name}: median error {found.median():.1e}, maximum {found.max():.1e}")
            papers = function(v, x, table="paper", **({"fallback": "rothwell"} if kind == "K" else {}))
            finite = min(finite, float(papers.isfinite().double().mean()))
            found, regions = errors(kind, v, x, papers), regions_of(v, x, "paper")
            for code in sorted(set(regions.tolist())):
                region = "fallback" if REGIONS[code].startswith("small") else REGIONS[code]
                branches.setdefault(f"{kind} {region}", []).extend(found[regions == code].tolist())
    for branch, found_errors in sorted(branches.items()):
        figures[f"paper's table, median error, {branch}"] = statistics.median(found_errors)
    return figures | {"share of finite values": finite}


def speed(seed: int, say: Say) -> Figures:
    figures: Figures = {}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    counts = (1, cores) if cores > 1 else (1,)
    for name in ("0-150", "small", "150-1e4"):
        for kind in FUNCTIONS:
            ours, theirs, finite = times(kind, name, seed, counts)
            figures[f"times SciPy on one core, {kind}, {name}"] = theirs / ours[1]
            figures[f"times SciPy on all cores, {kind}, {name}"] = theirs / ours[counts[-1]]
            figures[f"share of SciPy's values that are finite, {kind}, {name}"] = finite
            gains = " and ".join(f"{theirs / t:.1f}" for t in ours.values())
            say(f"  log {kind}, {name}: {ours[1] * 1e9:.1f} ns a pair, {gains} times SciPy on {' and '.join(map(str, ours))} cores")
    for which in ("one core", "all cores"):
        gained = [value for key, value in figures.items() if key.startswith(f"times SciPy on {which},")]
        figures |= {f"median of times SciPy on {which}": statistics.median(gained), f"maximum of times SciPy on {which}": max(gained)}
    return figures | {"cores": float(cores)}


def fits(seed: int, say: Say) -> Figures:
    """Deviations of fitted concentrations in standard errors, and what SciPy's fit makes of the first of them."""
    from scipy.stats import vonmises_fisher

    figures: Figures = {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for p in DIMENSIONS:
            for kappa in CONCENTRATIONS:
                loc = torch.nn.functional.normalize(torch.randn(p, dtype=torch.float64), dim=0)
                sample = VonMisesFisher(loc, kappa).sample((SAMPLES,))
                for estimator in ("likelihood", "marginal"):
                    fit = VonMisesFisher.fit(sample, estimator=estimator).fitted
                    assert fit is not None
                    figures[f"{estimator}, deviation, p {p}, kappa {kappa:g}"] = (fit.concentration - kappa) / fit.standard_error
                    say(f"  p {p}, kappa {kappa:g}, {estimator}: {fit.concentration:.6g} +- {fit.standard_error:.2g}")
                if (p, kappa) == (2048, 5e3):
                    with np.errstate(all="ignore"):
                        figures["SciPy's fit over the truth, p 2048, kappa 5000"] = float(vonmises_fisher.fit(sample.numpy())[1]) / kappa
    return figures


def measure(seed: int, say: Say) -> Figures:
    try:
        import flint  # noqa: F401
        import scipy  # noqa: F401
    except ImportError as error:
        raise UsageError(f"claim log-bessel: needs python-flint and scipy to compare with ({error}); pip install python-flint scipy") from None
    return accuracy(seed, say) | speed(seed, say) | fits(seed, say)


def _all(figures: Figures, start: str, passes: Callable[[float], bool], *, but: str = "\0") -> bool:
    """Whether every figure whose name starts so passes, except those that contain ``but``; False for none."""
    found = [value for name, value in figures.items() if name.startswith(start) and but not in name]
    return bool(found) and all(math.isfinite(value) and passes(value) for value in found)


CLAIM = Claim(
    name="log-bessel",
    sentence="log I_v and log K_v reach machine precision without under- or overflow, many times faster than libraries, and make von "
    "Mises-Fisher fits possible in tens of thousands of dimensions.",
    source="Plesner, Sorensen and Hauberg, ICS 2024, arXiv 2409.08729",
    work=f"{POINTS} pairs of each range against ball arithmetic (error relative to max(1, |value|)); {TIMED:,} pairs for times, on the CPU, "
    f"beside SciPy's log(ive) + x and log(kve) - x on one core; {SAMPLES} samples a fit",
    data=lambda: "numbers drawn at random",
    measure=measure,
    paper={"median speed-up over SciPy, CPU": 35, "maximum speed-up over SciPy, CPU": 98, "median speed-up over SciPy, GPU": 77},
    tests=(
        Test("every value is finite, with our table and the paper's", lambda f: f["share of finite values"] == 1),
        Test("median errors are at most 3e-16 in every range", lambda f: _all(f, "median error", lambda e: e <= 3e-16)),
        Test(
            "maximum errors are at most 5e-14, from 150 to 1e4 at most 2e-12",
            lambda f: _all(f, "maximum error", lambda e: e <= 5e-14, but="150-1e4") and _all(f, "maximum error", lambda e: e <= 2e-12),
        ),
        Test(
            "with the paper's table median errors are at most 3e-16 in every branch but the integral for K",
            lambda f: _all(f, "paper's table", lambda e: e <= 3e-16, but="K fallback"),
        ),
        Test(
            "at least 10 times SciPy on one core, 0 to 150 and 150 to 1e4",
            lambda f: _all(f, "times SciPy on one core", lambda t: t >= 10, but="small"),
        ),
        Test("the paper's median of 35 times SciPy is reached on all cores", lambda f: f["median of times SciPy on all cores"] >= 35),
        Test("the paper's median of 35 times SciPy is reached on one core", lambda f: f["median of times SciPy on one core"] >= 35),
        Test(
            "maximum likelihood is within 4 standard errors of every concentration",
            lambda f: _all(f, "likelihood, deviation", lambda z: abs(z) <= 4),
        ),
        Test(
            "the marginal estimate is within 4 standard errors of every concentration",
            lambda f: _all(f, "marginal, deviation", lambda z: abs(z) <= 4),
        ),
        Test("SciPy's fit is off by more than half where ours works", lambda f: not 0.5 < f["SciPy's fit over the truth, p 2048, kappa 5000"] < 1.5),
    ),
    caveat="SciPy runs on one core and returns at once where it overflows, which makes it fast where it fails. Maximum likelihood overestimates "
    "small concentrations in many dimensions whoever computes it, since the mean of n random directions has length 1 / sqrt(n).",
)
