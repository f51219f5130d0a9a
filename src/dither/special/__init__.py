"""Numerics that several folders share: Hadamard matrices of many orders and their fast products, softmax in two passes."""

from __future__ import annotations

from dither.special.hadamard import apply_hadamard, factors, hadamard, random_hadamard, random_rotation
from dither.special.softmax import log_softmax, logsumexp, softmax

__all__ = [
    "apply_hadamard", "factors", "hadamard", "log_softmax", "logsumexp", "random_hadamard", "random_rotation", "softmax",
]
