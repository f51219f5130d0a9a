"""Numerics that several folders share: Hadamard matrices of many orders, their fast products, and sparse Walsh-Hadamard transforms; logarithms of
Bessel functions and the von Mises-Fisher distribution; softmax in two passes. What quantization does not need is loaded when first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dither.special.fwht import fwht, fwht_
from dither.special.hadamard import apply_hadamard, factors, hadamard, random_hadamard, random_rotation
from dither.special.softmax import log_softmax, logsumexp, softmax

if TYPE_CHECKING:
    from dither.special.log_bessel import bessel_ratio, log_iv, log_kv
    from dither.special.spright import SparseWHT, sparse_wht
    from dither.special.von_mises_fisher import VonMisesFisher

_LATER = {
    "SparseWHT": "spright", "VonMisesFisher": "von_mises_fisher", "bessel_ratio": "log_bessel", "log_iv": "log_bessel", "log_kv": "log_bessel",
    "sparse_wht": "spright",
}  # fmt: skip
__all__ = [
    "SparseWHT", "VonMisesFisher", "apply_hadamard", "bessel_ratio", "factors", "fwht", "fwht_", "hadamard", "log_iv", "log_kv", "log_softmax",
    "logsumexp", "random_hadamard", "random_rotation", "softmax", "sparse_wht",
]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'dither.special' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"dither.special.{_LATER[name]}"), name)
    return value


def __dir__() -> list[str]:
    return __all__
