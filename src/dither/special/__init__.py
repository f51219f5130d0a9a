"""Numerics that several folders share: Hadamard matrices of many orders and their fast products."""

from __future__ import annotations

from dither.special.hadamard import apply_hadamard, factors, hadamard, random_hadamard, random_rotation

__all__ = ["apply_hadamard", "factors", "hadamard", "random_hadamard", "random_rotation"]
