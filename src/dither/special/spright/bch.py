"""Which few of n <= 63 bits are set, from t m parities instead of n: a binary BCH code's checks and their decoder, over many words at once.

    S_j = sum_i k_i alpha^{i j},   j = 1, 3, .. 2 t - 1,   alpha primitive in GF(2^m),   m = ceil(log2(n + 1))

tell apart all k of at most t bits, since two of them differ by less than the code's distance 2 t + 1. Even sums are squares, S_2j = S_j^2. Berlekamp
and Massey's algorithm finds the polynomial Lambda(z) = prod (1 - alpha^i z) over the set bits i, whose zeros are then tried one by one. Cost a
word: 2 t^2 products in the field, and n t for the zeros. Sources: Bose and Ray-Chaudhuri, 1960; Hocquenghem, 1959; Massey, IEEE Trans. Information
Theory 15, 1969.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from dither.special.spright.gf2 import Masks

PRIMITIVE = {1: 0b11, 2: 0b111, 3: 0b1011, 4: 0b10011, 5: 0b100101, 6: 0b1000011}  # polynomials over GF(2), by degree m

Elements = NDArray[np.int64]  # of GF(2^m), bit i the coefficient of alpha^i


def width(n: int) -> int:
    """m: bits of an element of the least field that has n powers of alpha."""
    return n.bit_length()


@lru_cache(maxsize=len(PRIMITIVE))
def _field(m: int) -> tuple[Elements, Elements]:
    """alpha^i for i = 0 .. 2^m - 2, and all products ``[2^m, 2^m]``."""
    powers = [1]
    while len(powers) < (1 << m) - 1:
        twice = powers[-1] << 1
        powers.append(twice ^ PRIMITIVE[m] if twice >> m else twice)
    alpha = np.array(powers)
    log = np.zeros(1 << m, dtype=np.int64)
    log[alpha] = np.arange(len(alpha))
    products = alpha[(log[:, None] + log[None, :]) % len(alpha)]
    products[0], products[:, 0] = 0, 0
    return alpha, products


def checks(n: int, t: int) -> Masks:
    """The parities ``[t m]`` as masks of n bits: mask s m + b gives bit b of S_{2 s + 1}."""
    alpha, _ = _field(m := width(n))
    found = []
    for j in range(1, 2 * t, 2):
        column = alpha[np.arange(n) * j % len(alpha)]
        found += [sum(1 << i for i in range(n) if column[i] >> b & 1) for b in range(m)]
    return np.array(found, dtype=np.uint64)


def decode(parities: NDArray[np.bool_], n: int, t: int) -> Masks:
    """The k ``[A]`` with the parities ``[A, t m]``, where a k of at most t bits has them; elsewhere any mask."""
    m = width(n)
    alpha, products = _field(m)
    odd = (parities.reshape(len(parities), t, m) << np.arange(m)).sum(axis=2)  # [A, t]
    s = np.zeros((len(parities), 2 * t + 1), dtype=np.int64)  # from S_1 on
    s[:, 1::2] = odd
    for j in range(2, 2 * t + 1, 2):
        s[:, j] = products[s[:, j // 2], s[:, j // 2]]
    locator = _locators(s[:, 1:], products)
    # Lambda(alpha^-i) = 0 where bit i is set
    size = len(alpha)
    values = np.zeros((len(parities), n), dtype=np.int64)
    for j in range(t + 1):
        values ^= products[locator[:, j, None], alpha[-j * np.arange(n) % size][None, :]]
    found: Masks = ((values == 0).astype(np.uint64) << np.arange(n, dtype=np.uint64)).sum(axis=1, dtype=np.uint64)
    return found


def _locators(s: Elements, products: Elements) -> Elements:
    """Lambda ``[A, t + 1]`` of the least degree with sum_i Lambda_i S_{r - i} = 0, from S_1 .. S_2t ``[A, 2 t]``."""
    words, count = s.shape
    inverse = np.zeros(len(products), dtype=np.int64)
    inverse[1:] = (products[1:] == 1).argmax(axis=1)
    now, before = np.zeros((2, words, count + 1), dtype=np.int64)
    now[:, 0] = before[:, 0] = 1
    degree, last = np.zeros(words, dtype=np.int64), np.ones(words, dtype=np.int64)  # of `now`; the discrepancy of `before`
    for r in range(count):
        before = np.roll(before, 1, axis=1)  # times z; its highest term is 0 still
        off = np.zeros(words, dtype=np.int64)
        for i in range(r + 1):
            off ^= products[now[:, i], s[:, r - i]]
        longer = (off != 0) & (2 * degree <= r)
        changed = now ^ products[products[off, inverse[last]][:, None], before]
        before = np.where(longer[:, None], now, before)
        last = np.where(longer, off, last)
        degree = np.where(longer, r + 1 - degree, degree)
        now = changed
    found: Elements = now[:, : count // 2 + 1]
    return found
