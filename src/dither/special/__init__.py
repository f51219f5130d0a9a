"""Numerics that several folders share: Hadamard matrices of many orders, their fast products, and sparse Walsh-Hadamard transforms."""

from __future__ import annotations

from dither.special.fwht import fwht, fwht_
from dither.special.hadamard import apply_hadamard, factors, hadamard, random_hadamard, random_rotation
from dither.special.spright import SparseWHT, sparse_wht

__all__ = ["SparseWHT", "apply_hadamard", "factors", "fwht", "fwht_", "hadamard", "random_hadamard", "random_rotation", "sparse_wht"]
