"""Subsampling is hashing: coefficient k of f falls into bin M^T k of a group, and an offset d turns its sign by (-1)^<d, k>.

    U[j, p] = (1/B) sum_l f(M l + d_p) (-1)^<l, j> = sum_{k: M^T k = j} X_k (-1)^<d_p, k> + noise of variance sigma^2 / B,     j, l in F_2^b, B = 2^b

Offsets of one coset of M's span see the same samples in another order: with d' = d + M l0, U[j, d'] = (-1)^<l0, j> U[j, d]. Such samples are asked
for once.

Which M: ``block`` takes b unit vectors that no other group has (the paper's choice for very sparse signals, K <= N^(1/3)); ``overlap`` takes
cyclic windows of b unit vectors that start n / C apart (the paper's for denser ones); both spread uniformly random supports only. ``random``, of
full rank, spreads any support, those of few variables or low degree too. Source: Li, Bradley, Pawar, Ramchandran, 2015 (1508.06336), section 4;
random M as in q-SFT (2301.06200).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from dither.special.fwht import fwht
from dither.special.spright.gf2 import Echelon, Masks, Values, echelon, random_full_rank, signs, span, transposed, units
from dither.special.spright.query import Samples

HASHES = ("random", "block", "overlap")


def matrices(kind: str, n: int, b: int, groups: int, generator: np.random.Generator) -> list[Masks]:
    """M of each group, its b columns; the first b' columns are an M too. Raises ValueError where blocks of b do not fit into n bits."""
    if kind == "block":
        if groups * b > n:
            raise ValueError(f"hashing: {groups} blocks of {b} bits do not fit into n = {n}; 'random' and 'overlap' have no such limit")
        return [units(n)[c * (n // groups) :][:b] for c in range(groups)]
    if kind == "overlap":
        return [units(n)[(c * n // groups + np.arange(b)) % n] for c in range(groups)]
    return [random_full_rank(n, b, generator) for _ in range(groups)]


@dataclass
class Group:
    """One M with the samples f(M l + d_p): as many rows as cosets, the offsets' places in them, and the bins' transform."""

    columns: Masks  # [b]
    offsets: Masks  # [P]
    samples: Values = field(repr=False)  # [cosets, B], in the order of l
    representatives: Masks = field(init=False, repr=False)  # [cosets]
    rows: np.ndarray = field(init=False, repr=False)  # [P]: the coset of each offset
    first: np.ndarray = field(init=False, repr=False)  # [cosets]: the first offset of each
    echelon: Echelon = field(init=False, repr=False)

    @classmethod
    def sampled(cls, columns: Masks, offsets: Masks, f: Samples) -> Group:
        group = cls(columns, offsets, np.zeros((0, 0)))
        masks = group.representatives[:, None] ^ span(columns)[None, :]  # [cosets, B]
        group.samples = f(masks.reshape(-1)).reshape(masks.shape)
        return group

    def __post_init__(self) -> None:
        self.echelon = echelon(self.columns)
        places: dict[int, int] = {}
        split = [self.echelon.split(int(d))[0] for d in self.offsets]
        self.rows = np.array([places.setdefault(r, len(places)) for r in split])
        self.first = np.unique(self.rows, return_index=True)[1]
        self.representatives = np.array(list(places), dtype=np.uint64)

    def finer(self, column: int, f: Samples) -> Group:
        """The group with one more column, B twice as large. Where two cosets become one, no sample is asked for: each has the other's half."""
        columns = np.append(self.columns, np.uint64(column))
        group = Group(columns, self.offsets, np.zeros((0, 0)))
        old = {int(r): i for i, r in enumerate(self.representatives)}
        wanted, known = [], []
        for r in group.representatives:  # the halves with and without the new column, as cosets of the old span
            for half in (int(r), int(r) ^ column):
                coset, shift = self.echelon.split(half)
                known.append((old.get(coset), shift))
                if coset not in old:
                    wanted.append(half)
        masks = np.array(wanted, dtype=np.uint64)[:, None] ^ span(self.columns)[None, :]
        asked = iter(f(masks.reshape(-1)).reshape(masks.shape))
        index = np.arange(1 << len(self.columns))
        halves = [next(asked) if row is None else self.samples[row][index ^ shift] for row, shift in known]
        group.samples = np.stack(halves).reshape(len(group.representatives), -1)
        return group

    @property
    def bins(self) -> int:
        return 1 << len(self.columns)

    def hash(self, k: Masks) -> np.ndarray:
        """The bin M^T k of each k."""
        return transposed(self.columns, k)

    def transform(self) -> Values:
        """U ``[B, P]``."""
        spectra = fwht(self.samples / self.bins)  # [cosets, B]
        turns = np.array([self.echelon.split(int(d))[1] for d in self.offsets], dtype=np.uint64)
        return np.ascontiguousarray((spectra[self.rows] * signs(turns, np.arange(self.bins, dtype=np.uint64))).T)

    def masks(self) -> Masks:
        """Every mask that was asked for."""
        return (self.representatives[:, None] ^ span(self.columns)[None, :]).reshape(-1)
