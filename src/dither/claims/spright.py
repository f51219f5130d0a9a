"""SPRIGHT (arXiv 1508.06336): a K-sparse Walsh-Hadamard transform of length N from O(K log N) noisy samples."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import numpy as np

from dither.claims import spright_peers as peers
from dither.claims.claim import Claim, Figures, Say, Test
from dither.special import SparseWHT, fwht, sparse_wht

T = TypeVar("T")

RUNS = 25  # signals a seed
BITS, K, SNR = 20, 100, 10.0
FIXED_K, LENGTHS = 32, (12, 16, 20, 24, 28, 32, 36, 40)
PEER_BITS, PEER_K = 16, 64
LASSO_BITS, LASSO_K = 12, 16
LONG = 24


def recovery(seed: int) -> Figures:
    """n = 20, K = 100: three modes on the same supports."""
    figures: Figures = {}
    for mode, snr in (("noiseless", None), ("nso", SNR), ("so", SNR)):
        found: list[tuple[peers.Signal, SparseWHT]] = []
        for run in range(RUNS):
            s = peers.signal(BITS, K, snr, 1000 * seed + run)
            found.append((s, sparse_wht(s.f, k=K, sigma=s.sigma, mode=mode, seed=1000 * seed + run)))
        figures[f"{mode} exact"] = statistics.fmean(s.exact(x.support) for s, x in found)
        figures[f"{mode} recall"] = statistics.fmean(s.recall(x.support) for s, x in found)
        figures[f"{mode} share of samples"] = statistics.fmean(x.n_queries for _, x in found) / (1 << BITS)
        figures[f"{mode} said complete"] = statistics.fmean(x.complete for _, x in found)
    s = peers.signal(BITS, K, SNR, 1000 * seed)
    x = peers.dense(s)
    figures["full transform recall"] = s.recall(np.flatnonzero(x).astype(np.uint64))
    figures["full transform error"] = s.error(x)
    figures["so error"] = s.error(sparse_wht(s.f, k=K, sigma=s.sigma, mode="so", seed=1000 * seed).to_dense())
    return figures


def scaling(seed: int) -> Figures:
    """K = 32, n = 12 .. 40: samples and recall of each mode, and the exponents of samples in n."""
    figures: Figures = {}
    for mode, snr in (("noiseless", None), ("nso", SNR), ("so", SNR)):
        samples, recalls, seconds = [], [], []
        for n in LENGTHS:
            found = []
            for run in range(4):
                f = peers.Sampled(n, FIXED_K, snr, 1000 * seed + run)
                started = time.perf_counter()
                x = sparse_wht(f, n, FIXED_K, f.sigma, mode, 1000 * seed + run, eta=2.0)
                found.append((f.recall(x), x.n_calls, time.perf_counter() - started))
            recalls.append(statistics.fmean(r for r, _, _ in found))
            samples.append(statistics.fmean(q for _, q, _ in found))
            seconds.append(min(t for _, _, t in found))
        figures[f"K = {FIXED_K} {mode} least recall over n"] = min(recalls)
        figures[f"K = {FIXED_K} {mode} exponent of samples in n"] = exponent(LENGTHS, samples)
        figures[f"K = {FIXED_K} {mode} exponent of seconds in n"] = exponent(LENGTHS, seconds)
        figures[f"K = {FIXED_K} {mode} samples at n = {LENGTHS[-1]}"] = samples[-1]
    return figures


def against(seed: int) -> Figures:
    """Others on the same signals: Lasso at as many samples, q-SFT with as many bins and offsets. A peer that is not installed has no figures."""
    figures: Figures = {}
    s = peers.signal(LASSO_BITS, LASSO_K, SNR, seed)
    x, seconds = timed(lambda: sparse_wht(s.f, k=LASSO_K, sigma=s.sigma, mode="so", seed=seed))
    figures |= {f"n = {LASSO_BITS} so error": s.error(x.to_dense()), f"n = {LASSO_BITS} so seconds": seconds}
    if not peers.absent("lasso"):
        other, seconds = timed(lambda: peers.lasso(s, x.n_queries, seed))
        figures |= {f"n = {LASSO_BITS} Lasso error": s.error(other), f"n = {LASSO_BITS} Lasso seconds": seconds}
    ours, theirs = [], []
    for run in range(8):
        s = peers.signal(PEER_BITS, PEER_K, 5.0, 1000 * seed + run)
        x, seconds = timed(partial(sparse_wht, s.f, k=PEER_K, sigma=s.sigma, mode="nso", p1=5, seed=run))
        ours.append((s.exact(x.support), s.recall(x.support), seconds))
        if not peers.absent("q-sft"):
            (support, _), seconds = timed(partial(peers.qsft, s, 6, 5, run))
            theirs.append((s.exact(support), s.recall(support), seconds))
    for name, rows in (("nso P1 = 5", ours), ("q-SFT P1 = 5", theirs)):
        if rows:
            exact, recall, seconds_of = zip(*rows, strict=True)
            figures |= {f"n = {PEER_BITS} {name} exact": statistics.fmean(exact), f"n = {PEER_BITS} {name} recall": statistics.fmean(recall)}
            figures[f"n = {PEER_BITS} {name} seconds"] = statistics.median(seconds_of)
    return figures


def crossover(seed: int) -> Figures:
    """A table of 2^24 values in memory: all of it, or what the sparse transform asks for."""
    s = peers.signal(LONG, K, None, seed)
    full = statistics.median(timed(lambda: fwht(s.f))[1] for _ in range(5))
    sparse = statistics.median(timed(lambda: sparse_wht(s.f, k=K, seed=seed))[1] for _ in range(5))
    return {f"n = {LONG} full transform seconds": full, f"n = {LONG} noiseless seconds": sparse}


def timed(run: Callable[[], T]) -> tuple[T, float]:
    started = time.perf_counter()
    return run(), time.perf_counter() - started


def exponent(x: tuple[int, ...], y: list[float]) -> float:
    """The slope of log y over log x."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def measure(seed: int, say: Say) -> Figures:
    for peer in ("lasso", "q-sft"):
        if missing := peers.absent(peer):
            say(missing)
    figures: Figures = {}
    for part in (recovery, scaling, against, crossover):
        say(f"{part.__name__}: {(part.__doc__ or '').splitlines()[0]}")
        figures |= part(seed)
    return figures


CLAIM = Claim(
    name="spright",
    sentence="K non-zero Walsh-Hadamard coefficients of N are recovered from O(K log N) samples, with noise as without, and sublinear time.",
    source="Li, Bradley, Pawar, Ramchandran, 2015, arXiv 1508.06336, theorems 1 and 2; repository UCBASiCS/SPRIGHT",
    work=f"coefficients of +-1 at uniformly random places; n = {BITS}, K = {K} ({RUNS} signals a seed), and K = {FIXED_K}, n = {LENGTHS[0]} to "
    f"{LENGTHS[-1]}; noise at {SNR:g} dB where there is any",
    data=lambda: "synthetic",
    measure=measure,
    tests=(
        Test("without noise at least 95 % of supports are exact", lambda f: f["noiseless exact"] >= 0.95),
        Test("from at most 1 % of the values", lambda f: f["noiseless share of samples"] <= 0.01),
        Test("nso: at least 95 % of supports are exact", lambda f: f["nso exact"] >= 0.95),
        Test("so: recall of at least 0.99", lambda f: f["so recall"] >= 0.99),
        Test("so asks for at most 0.45 of nso's samples", lambda f: f["so share of samples"] <= 0.45 * f["nso share of samples"]),
        Test(
            "recall at fixed K stays at 0.98 or above for all n in every mode",
            lambda f: min(f[f"K = {FIXED_K} {mode} least recall over n"] for mode in ("noiseless", "nso", "so")) >= 0.98,
        ),
        Test(
            "samples at fixed K grow no faster than n^1.1 without noise and in so",
            lambda f: max(f[f"K = {FIXED_K} {mode} exponent of samples in n"] for mode in ("noiseless", "so")) <= 1.1,
        ),
        Test("time at fixed K grows no faster than n^2 in so", lambda f: f[f"K = {FIXED_K} so exponent of seconds in n"] <= 2),
        Test(
            f"at n = {LONG} the sparse transform takes less time than the full one, whose values lie in memory",
            lambda f: f[f"n = {LONG} noiseless seconds"] < f[f"n = {LONG} full transform seconds"],
        ),
        Test(
            "the error at as many samples is no more than Lasso's",
            lambda f: f[f"n = {LASSO_BITS} so error"] <= f.get(f"n = {LASSO_BITS} Lasso error", -1.0),
        ),
        Test(
            "recall is no less than q-SFT's with as many bins and offsets",
            lambda f: f[f"n = {PEER_BITS} nso P1 = 5 recall"] >= f.get(f"n = {PEER_BITS} q-SFT P1 = 5 recall", 2.0),
        ),
    ),
    caveat="Supports are uniformly random, as in the theorems. Lasso's threshold and penalty are the usual ones, not tuned. A test against a peer "
    "that is not installed does not hold.",
)
