"""Linear algebra over the field of two elements. A vector of n <= 63 bits is an unsigned integer, bit i its coordinate i; a matrix ``[n, b]`` is
its b columns.

Cost: b^2 operations on words for an echelon form, and b for each vector that goes through a matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Masks = NDArray[np.uint64]
Reals = NDArray[np.float64]
Values = NDArray[Any]  # float64 or complex128


def signs(a: Masks, b: Masks) -> Reals:
    """``[len(a), len(b)]`` of (-1)^<a, b>."""
    found: Reals = 1.0 - 2.0 * (np.bitwise_count(a[:, None] & b[None, :]) & 1)
    return found


def units(n: int) -> Masks:
    """The unit vectors e_0 .. e_{n-1}."""
    return np.uint64(1) << np.arange(n, dtype=np.uint64)


def span(columns: Masks) -> Masks:
    """M l for l = 0 .. 2^b - 1, ``[2^b]``."""
    found = np.zeros(1 << len(columns), dtype=np.uint64)
    for i, column in enumerate(columns):
        found[1 << i : 2 << i] = found[: 1 << i] ^ column
    return found


def transposed(columns: Masks, k: Masks) -> NDArray[np.int64]:
    """M^T k for each of k: bit i of it is <column i, k>."""
    found = np.zeros(k.shape, dtype=np.int64)
    for i, column in enumerate(columns):
        found |= (np.bitwise_count(k & column) & 1).astype(np.int64) << i
    return found


@dataclass(frozen=True)
class Echelon:
    """The columns of M [n, b] in reduced echelon form: vector i has bit ``pivots[i]``, which no other has, and is the sum of the columns in
    the bit set ``sums[i]``."""

    vectors: tuple[int, ...]
    pivots: tuple[int, ...]
    sums: tuple[int, ...]

    @property
    def rank(self) -> int:
        return len(self.vectors)

    def split(self, d: int) -> tuple[int, int]:
        """``(r, l)`` with d = r + M l, where r is the same for all d of a coset of the columns' span."""
        index = 0
        for vector, pivot, columns in zip(self.vectors, self.pivots, self.sums, strict=True):
            if d >> pivot & 1:
                d ^= vector
                index ^= columns
        return d, index

    def null_space(self, n: int) -> Masks:
        """A basis of all k with M^T k = 0, n - rank vectors."""
        free = [f for f in range(n) if f not in self.pivots]
        basis = [1 << f | sum(1 << p for v, p in zip(self.vectors, self.pivots, strict=True) if v >> f & 1) for f in free]
        return np.array(basis, dtype=np.uint64)

    def preimages(self) -> Masks:
        """Columns of G [n, b] with M^T G = I, so that k = G j solves M^T k = j. Only for M of full column rank."""
        found = [0] * self.rank
        for pivot, columns in zip(self.pivots, self.sums, strict=True):  # M^T e_pivot is `columns`, read as the inverse's row
            for i in range(self.rank):
                if columns >> i & 1:
                    found[i] |= 1 << pivot
        return np.array(found, dtype=np.uint64)


def echelon(columns: Sequence[int] | Masks) -> Echelon:
    """Gauss and Jordan; columns that depend on those before them are left out, which shows in the rank."""
    vectors: list[int] = []
    pivots: list[int] = []
    sums: list[int] = []
    for i, column in enumerate(int(c) for c in columns):
        combined = 1 << i
        for vector, pivot, made in zip(vectors, pivots, sums, strict=True):
            if column >> pivot & 1:
                column ^= vector
                combined ^= made
        if column == 0:
            continue
        pivot = column.bit_length() - 1
        for j, vector in enumerate(vectors):
            if vector >> pivot & 1:
                vectors[j] ^= column
                sums[j] ^= combined
        vectors.append(column)
        pivots.append(pivot)
        sums.append(combined)
    return Echelon(tuple(vectors), tuple(pivots), tuple(sums))


def random_masks(n: int, count: int, generator: np.random.Generator) -> Masks:
    """Vectors of n bits, independent and uniform."""
    return generator.integers(0, 1 << n, count, dtype=np.uint64)


def random_full_rank(n: int, b: int, generator: np.random.Generator) -> Masks:
    """The columns ``[b]`` of a uniformly random M [n, b] of rank b <= n."""
    columns: list[int] = []
    while len(columns) < b:
        candidate = int(random_masks(n, 1, generator)[0])
        if echelon([*columns, candidate]).rank > len(columns):
            columns.append(candidate)
    return np.array(columns, dtype=np.uint64)
