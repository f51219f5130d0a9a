"""Numerics that several folders share: Hadamard matrices of many orders, their fast products, and sparse Walsh-Hadamard transforms; logarithms of
Bessel functions and the von Mises-Fisher distribution; softmax in two passes."""

from __future__ import annotations

from dither.special.fwht import fwht, fwht_
from dither.special.hadamard import apply_hadamard, factors, hadamard, random_hadamard, random_rotation
from dither.special.log_bessel import bessel_ratio, log_iv, log_kv
from dither.special.softmax import log_softmax, logsumexp, softmax
from dither.special.spright import SparseWHT, sparse_wht
from dither.special.von_mises_fisher import VonMisesFisher

__all__ = [
    "SparseWHT", "VonMisesFisher", "apply_hadamard", "bessel_ratio", "factors", "fwht", "fwht_", "hadamard", "log_iv", "log_kv", "log_softmax",
    "logsumexp", "random_hadamard", "random_rotation", "softmax", "sparse_wht",
]
