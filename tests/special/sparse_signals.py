"""Sparse signals with known spectra, for the tests of sparse transforms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dither.special import SparseWHT, fwht


@dataclass(frozen=True)
class Signal:
    """``f`` is an array of all values, with its noise."""

    support: np.ndarray
    values: np.ndarray
    f: np.ndarray
    sigma: float

    def exact(self, found: SparseWHT) -> bool:
        return set(found.support.tolist()) == set(self.support.tolist())

    def recall(self, found: SparseWHT) -> float:
        return len(set(found.support.tolist()) & set(self.support.tolist())) / len(self.support)


def signal(n: int, k: int, snr: float | None, seed: int, kind: str = "signs") -> Signal:
    """K coefficients at random places: +-1, normal, or of modulus 1 in the complex plane; ``snr`` in dB, None without noise."""
    g = np.random.default_rng([seed, n, k])
    support = g.choice(1 << n, k, replace=False).astype(np.uint64)
    values: Any = {
        "signs": lambda: g.choice([-1.0, 1.0], k),
        "normal": lambda: g.standard_normal(k),
        "complex": lambda: np.exp(2j * np.pi * g.random(k)),
    }[kind]()
    dense = np.zeros(1 << n, dtype=values.dtype)
    dense[support] = values
    f = fwht(dense)
    sigma = 0.0 if snr is None else float(np.sqrt((np.abs(values) ** 2).sum() / 10 ** (snr / 10)))
    if sigma:
        noise = g.standard_normal(1 << n) if kind != "complex" else (g.standard_normal((1 << n, 2)) @ [1, 1j]) / np.sqrt(2)
        f = f + sigma * noise
    return Signal(support, values, f, sigma)
