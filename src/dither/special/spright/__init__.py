"""Sparse Walsh-Hadamard transforms: the few large coefficients of a function of bits, from few samples of it (`sparse.sparse_wht`)."""

from __future__ import annotations

from dither.special.spright.sparse import SparseWHT, sparse_wht

__all__ = ["SparseWHT", "sparse_wht"]
