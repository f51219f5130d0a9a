"""Numerics that several folders share: Hadamard matrices of many orders and their fast products; logarithms of Bessel
functions and the von Mises-Fisher distribution."""

from __future__ import annotations

from dither.special.hadamard import apply_hadamard, factors, hadamard, random_hadamard, random_rotation
from dither.special.log_bessel import bessel_ratio, log_iv, log_kv
from dither.special.von_mises_fisher import VonMisesFisher

__all__ = ["VonMisesFisher", "apply_hadamard", "bessel_ratio", "factors", "hadamard", "log_iv", "log_kv", "random_hadamard", "random_rotation"]
