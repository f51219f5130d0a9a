"""Which coefficient a bin holds, if it holds one: the offsets of each mode, and how the signs of U [A, P] at them give k.

A bin with the one coefficient (k, rho) reads U_p = rho (-1)^<d_p, k> + noise. The modes differ in the offsets that they ask for:

    noiseless   0 and the unit vectors: bit i of k is whether U changes sign between 0 and e_i.                  P = n + 1
    ml          P random ones: the best of all k that hash into the bin (near-linear; n <= 20).                 P = 3 n
    nso         P1 random ones, and each with one bit turned: bit i is a vote of P1 comparisons.                P = P1 (n + 1)
    so          P1 random ones, and the columns of a code: the signs are a noisy word of k, or its complement.  P = P1 + 2 (n + 6)
    low_degree  as nso, but with the t m parities turned that tell all k of at most t bits apart.             P = P1 (1 + t m), m = log2(n + 1)

Cost a bin: n, N P / B, P1 n, 128 (n + 6) 2, P1 t m + n t. The comparisons of nso and the words of so need no sign of rho. Complex values are first
turned so that rho is real. Source: 1508.06336, sections 5 and 6; the code there is any of linear distance. Low degrees: q-SFT (2301.06200).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dither.special.spright import bch, viterbi
from dither.special.spright.gf2 import Masks, Reals, Values, random_masks, signs, span, units
from dither.special.spright.hashing import Group

LARGEST_ML = 20  # bits, of the mode that tries every k
CHUNK = 1 << 22  # correlations at once


@dataclass(frozen=True)
class Mode(ABC):
    """``offsets [P]``, the same in every group."""

    n: int
    offsets: Masks
    name: ClassVar[str]

    @abstractmethod
    def locate(self, u: Values, bins: np.ndarray, group: Group) -> Masks:
        """The k ``[A]`` that each of the bins ``[A]`` with values ``u [A, P]`` holds if it holds one."""


class Noiseless(Mode):
    name = "noiseless"

    @classmethod
    def drawn(cls, n: int) -> Noiseless:
        return cls(n, np.append(np.uint64(0), units(n)))

    def locate(self, u: Values, bins: np.ndarray, group: Group) -> Masks:
        return packed((u[:, 1:] * u[:, :1].conj()).real < 0)


class Likely(Mode):
    name = "ml"

    @classmethod
    def drawn(cls, n: int, p1: int | None, generator: np.random.Generator) -> Likely:
        if n > LARGEST_ML:
            raise ValueError(f"mode: 'ml' tries all 2^(n - b) candidates of a bin and takes n up to {LARGEST_ML}, not {n}; 'nso' and 'so' take any")
        return cls(n, distinct(n, 3 * n if p1 is None else p1, generator))

    def locate(self, u: Values, bins: np.ndarray, group: Group) -> Masks:
        kernel = span(group.echelon.null_space(self.n))  # [N / B]: what the candidates of a bin differ by
        preimages = group.echelon.preimages()
        inner = signs(self.offsets, kernel)  # [P, N / B]
        found = np.empty(len(bins), dtype=np.uint64)
        for i in range(0, len(bins), rows := max(1, CHUNK // len(kernel))):
            outer = span_at(preimages, bins[i : i + rows])
            correlation = np.abs((u[i : i + rows] * signs(outer, self.offsets)) @ inner)  # [A, N / B]
            found[i : i + rows] = outer ^ kernel[correlation.argmax(axis=1)]
        return found


@dataclass(frozen=True)
class NearSampleOptimal(Mode):
    p1: int
    name = "nso"

    @classmethod
    def drawn(cls, n: int, p1: int | None, generator: np.random.Generator) -> NearSampleOptimal:
        reference = distinct(n, 10 if p1 is None else p1, generator)
        turned = reference[:, None] ^ units(n)[None, :]
        return cls(n, np.concatenate([reference, turned.reshape(-1)]), len(reference))

    def locate(self, u: Values, bins: np.ndarray, group: Group) -> Masks:
        reference, turned = u[:, : self.p1], u[:, self.p1 :].reshape(-1, self.p1, self.n)
        return packed(np.einsum("ap,apq->aq", reference.conj(), turned).real < 0)


@dataclass(frozen=True)
class SampleOptimal(Mode):
    p1: int
    name = "so"

    @classmethod
    def drawn(cls, n: int, p1: int | None, generator: np.random.Generator) -> SampleOptimal:
        reference = distinct(n, 16 if p1 is None else p1, generator)
        return cls(n, np.concatenate([reference, viterbi.columns(n)]), len(reference))

    def locate(self, u: Values, bins: np.ndarray, group: Group) -> Masks:
        word = real(u)[:, self.p1 :]
        k, metric = viterbi.decode(word, self.n)
        other, other_metric = viterbi.decode(-word, self.n)
        return np.where(other_metric > metric, other, k)


@dataclass(frozen=True)
class LowDegree(Mode):
    p1: int
    degree: int
    name = "low_degree"

    @classmethod
    def drawn(cls, n: int, p1: int | None, degree: int, exact: bool, generator: np.random.Generator) -> LowDegree:
        reference = np.zeros(1, dtype=np.uint64) if p1 is None and exact else distinct(n, 10 if p1 is None else p1, generator)
        turned = reference[:, None] ^ bch.checks(n, degree)[None, :]
        return cls(n, np.concatenate([reference, turned.reshape(-1)]), len(reference), degree)

    def locate(self, u: Values, bins: np.ndarray, group: Group) -> Masks:
        reference, turned = u[:, : self.p1], u[:, self.p1 :].reshape(len(u), self.p1, self.degree * bch.width(self.n))
        return bch.decode(np.einsum("ap,apq->aq", reference.conj(), turned).real < 0, self.n, self.degree)


MODES = (Noiseless.name, Likely.name, NearSampleOptimal.name, SampleOptimal.name, LowDegree.name)


def drawn(mode: str, n: int, p1: int | None, degree: int | None, exact: bool, generator: np.random.Generator) -> Mode:
    """The mode called so with its offsets; ``exact``: f has no noise. Raises ValueError where there are not so many offsets, or n is too large."""
    if mode == Noiseless.name:
        return Noiseless.drawn(n)
    if mode == Likely.name:
        return Likely.drawn(n, p1, generator)
    if mode == NearSampleOptimal.name:
        return NearSampleOptimal.drawn(n, p1, generator)
    if mode == LowDegree.name:
        assert degree is not None
        return LowDegree.drawn(n, p1, degree, exact, generator)
    return SampleOptimal.drawn(n, p1, generator)


def real(u: Values) -> Reals:
    """Complex values of each row turned by the angle at which they are, up to noise, +-rho: half that of the sum of squares."""
    if not np.iscomplexobj(u):
        return u
    angle = np.angle((u * u).sum(axis=1, keepdims=True)) / 2
    turned: Reals = (u * np.exp(-1j * angle)).real
    return turned


def packed(bits: np.ndarray) -> Masks:
    """Rows of bits ``[A, n]`` as masks."""
    found: Masks = (bits.astype(np.uint64) << np.arange(bits.shape[1], dtype=np.uint64)).sum(axis=1, dtype=np.uint64)
    return found


def span_at(columns: Masks, index: np.ndarray) -> Masks:
    """M l for each l of ``index``."""
    found = np.zeros(len(index), dtype=np.uint64)
    for i, column in enumerate(columns):
        found ^= np.where(index >> i & 1, column, np.uint64(0))
    return found


def distinct(n: int, count: int, generator: np.random.Generator) -> Masks:
    """Random masks of n bits, no two the same."""
    if count > 1 << n:
        raise ValueError(f"p1: {count} offsets of {n} bits cannot all differ")
    if n <= 16:
        return generator.permutation(1 << n)[:count].astype(np.uint64)
    found = random_masks(n, count, generator)
    while len(np.unique(found)) < count:
        found = random_masks(n, count, generator)
    return found
