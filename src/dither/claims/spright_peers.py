"""What sparse Walsh-Hadamard transforms are measured on and against: signals with known spectra, the full transform with a threshold, Lasso on random
samples, and q-SFT of the package sparse-transform (the method's authors, any alphabet). The last two are optional: without their packages `absent`
says so."""

from __future__ import annotations

import importlib.util
import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from dither.special import SparseWHT, fwht
from dither.special.spright.gf2 import Masks, signs, units

PACKAGES = {"lasso": "sklearn", "q-sft": "sparse_transform"}


@dataclass(frozen=True)
class Signal:
    """``f [2^n]`` with K coefficients of +-1 at uniformly random places and its noise."""

    n: int
    support: Masks
    values: np.ndarray
    f: np.ndarray
    sigma: float

    def recall(self, found: Masks) -> float:
        return len(np.intersect1d(found, self.support)) / len(self.support)

    def exact(self, found: Masks) -> bool:
        return bool(np.array_equal(np.sort(found), np.sort(self.support)))

    def error(self, dense: np.ndarray) -> float:
        """|X_found - X|^2 / |X|^2."""
        rest = dense.copy()
        rest[self.support] -= self.values
        return float((rest**2).sum() / (self.values**2).sum())


def signal(n: int, k: int, snr: float | None, seed: int) -> Signal:
    """``snr`` = sum X^2 / sigma^2 in dB; None without noise."""
    g = np.random.default_rng([seed, n, k])
    support = _places(n, k, g)
    values = g.choice([-1.0, 1.0], k)
    dense = np.zeros(1 << n)
    dense[support] = values
    f = fwht(dense)
    sigma = 0.0 if snr is None else math.sqrt(k / 10 ** (snr / 10))
    return Signal(n, support, values, f + sigma * g.standard_normal(1 << n) if sigma else f, sigma)


class Sampled:
    """The same without a table, for any n <= 63: each call draws its noise anew."""

    def __init__(self, n: int, k: int, snr: float | None, seed: int) -> None:
        self.generator = np.random.default_rng([seed, n, k])
        self.support = _places(n, k, self.generator)
        self.values = self.generator.choice([-1.0, 1.0], k)
        self.sigma = 0.0 if snr is None else math.sqrt(k / 10 ** (snr / 10))

    def __call__(self, masks: Masks) -> np.ndarray:
        parts = [signs(masks[i : i + 65536], self.support) @ self.values for i in range(0, len(masks), 65536)]
        f: np.ndarray = np.concatenate(parts)
        return f + self.sigma * self.generator.standard_normal(len(f)) if self.sigma else f

    def exact(self, found: SparseWHT) -> bool:
        return bool(np.array_equal(np.sort(found.support), np.sort(self.support)))

    def recall(self, found: SparseWHT) -> float:
        return len(np.intersect1d(found.support, self.support)) / len(self.support)


def _places(n: int, k: int, g: np.random.Generator) -> Masks:
    if n <= 24:
        return g.choice(1 << n, k, replace=False).astype(np.uint64)
    found = np.unique(g.integers(0, 1 << n, 2 * k, dtype=np.uint64))
    return g.permutation(found)[:k]


def absent(peer: str) -> str:
    """Why a peer cannot run, or nothing where it can."""
    package = PACKAGES.get(peer)
    return "" if package is None or importlib.util.find_spec(package) else f"{peer} is left out: the package {package} is not installed"


def dense(s: Signal) -> np.ndarray:
    """X ``[2^n]`` from all values, without what is under the highest that noise reaches among 2^n, or under 5 deviations, as in ours."""
    x = fwht(s.f) / len(s.f)
    deviations = max(5.0, math.sqrt(2 * math.log(len(s.f))))
    x[np.abs(x) < deviations * max(s.sigma, 1e-9) / math.sqrt(len(s.f))] = 0
    return x


def lasso(s: Signal, samples: int, seed: int) -> np.ndarray:
    """X ``[2^n]`` by l1-penalised least squares of uniformly random samples, the penalty at the noise's highest correlation; what it leaves under
    a fifth of the largest is removed."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import Lasso

    masks = np.random.default_rng(seed).choice(len(s.f), samples, replace=False).astype(np.uint64)
    design = signs(masks, np.arange(len(s.f), dtype=np.uint64))
    penalty = max(s.sigma, 0.05) * math.sqrt(2 * math.log(len(s.f)) / samples)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        x: np.ndarray = Lasso(alpha=penalty, fit_intercept=False, max_iter=50, precompute=False).fit(design, s.f[masks]).coef_
    x[np.abs(x) < 0.2 * np.abs(x).max(initial=0)] = 0
    return x


def qsft(s: Signal, b: int, p1: int, seed: int) -> tuple[Masks, int]:
    """The support that q-SFT finds in nso mode with as many bins and offsets as ours, and the samples it asked for, repeated ones included."""
    from sparse_transform.qsft.qsft import transform
    from sparse_transform.qsft.signals.input_signal_subsampled import SubsampledSignal

    weights = units(s.n)

    def f(rows: Any) -> np.ndarray:
        found: np.ndarray = s.f[(np.asarray(rows).astype(np.uint64) * weights).sum(axis=1)]
        return found

    how = {
        "query_method": "complex", "num_subsample": 3, "num_repeat": p1, "b": b, "all_bs": [b],
        "subsampling_method": "qsft", "delays_method_source": "identity", "delays_method_channel": "nso",
    }  # fmt: skip
    before = np.random.get_state()
    np.random.seed(seed)
    try:
        made = SubsampledSignal(func=f, n=s.n, q=2, query_args=how)
        found = transform(made, "identity", "nso-soft", b, 3, p1, noise_sd=s.sigma, report=True)
    finally:
        np.random.set_state(before)
    support = [sum(int(bit) << i for i, bit in enumerate(k)) for k in found["transform"]]
    return np.array(support, dtype=np.uint64), int(found["n_samples"])
