"""Hadamard matrices of orders that are no powers of two: Paley's two constructions (Paley, On orthogonal matrices, 1933).

Over the field of q elements, q an odd prime power, with chi(a) = 0 for a = 0, 1 for squares, -1 for the rest, let Q_ij = chi(a_i - a_j) and

    I   q = 3 mod 4, order q + 1:       H = I + S,   S = [[0, 1^T], [-1, Q]],  S^T = -S              not symmetric
    II  q = 1 mod 4, order 2 (q + 1):   H = C x [[1, 1], [1, -1]] + I x [[1, -1], [-1, -1]],   C = [[0, 1^T], [1, Q]]     symmetric

so orders 12, 20, 24, 28, 36, 44, 48, 52, 60, 68, 72, ... exist; 92, 116 and 156 are the first multiples of 4 that need other constructions.
Cost: q^2 field additions; some milliseconds for q = 500.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

CUBES = 3  # largest exponent of a prime power: a polynomial of degree 2 or 3 without roots is irreducible


def paley_order(order: int) -> int | None:
    """The q whose construction (I where there is one, else II) gives ``order``; None where neither does."""
    if order % 4 == 0 and order > 4:
        for q, residue in ((order - 1, 3), (order // 2 - 1, 1)):
            if q % 4 == residue and _prime_power(q) is not None:
                return q
    return None


@functools.lru_cache(maxsize=32)
def paley(order: int) -> Tensor:
    """The matrix ``[order, order]`` of +-1, int8. ValueError where Paley gives none. Shared by all callers: do not write to it."""
    q = paley_order(order)
    if q is None:
        raise ValueError(f"order: Paley's constructions give no Hadamard matrix of order {order}")
    first = order == q + 1
    conference = torch.zeros(q + 1, q + 1, dtype=torch.int8)  # S or C
    conference[0, 1:] = 1
    conference[1:, 0] = -1 if first else 1
    conference[1:, 1:] = _jacobsthal(q)
    eye = torch.eye(q + 1, dtype=torch.int8)
    if first:
        return eye + conference
    plus = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    minus = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    return torch.kron(conference, plus) + torch.kron(eye, minus)


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) with q = p^k, p an odd prime, k at most `CUBES`."""
    for k in range(1, CUBES + 1):
        p = round(q ** (1 / k))
        if p**k == q and p > 2 and p % 2 and all(p % d for d in range(3, int(p**0.5) + 1, 2)):
            return p, k
    return None


def _jacobsthal(q: int) -> Tensor:
    """``Q [q, q]`` int8. An element of the field is a polynomial over the integers mod p, its coefficients the digits of its index."""
    p, k = _prime_power(q) or (q, 1)
    digits = torch.arange(q)[:, None] // p ** torch.arange(k) % p  # [q, k], the constant first
    weights = p ** torch.arange(k)
    chi = torch.full((q,), -1, dtype=torch.int8)
    chi[(_squares(digits, p) * weights).sum(1)] = 1
    chi[0] = 0
    differences = (digits[:, None] - digits[None, :]) % p  # [q, q, k]
    return chi[(differences * weights).sum(2)]


def _squares(digits: Tensor, p: int) -> Tensor:
    """The square of each field element ``[q, k]``: of the polynomial, modulo a monic irreducible one of degree k."""
    q, k = digits.shape
    product = torch.zeros(q, 2 * k - 1, dtype=torch.int64)
    for i in range(k):
        product[:, i : i + k] += digits[:, i : i + 1] * digits
    reduction = _irreducible(p, k)  # x^k = sum_i reduction_i x^i
    for power in range(2 * k - 2, k - 1, -1):
        product[:, power - k : power] += product[:, power : power + 1] * reduction
        product %= p
    return product[:, :k] % p


def _irreducible(p: int, k: int) -> Tensor:
    """``r [k]`` such that x^k - sum_i r_i x^i has no root mod p, which for k = 2 and 3 means that it has no factor."""
    x = torch.arange(p)
    for constant in range(p):
        for linear in range(p):
            if k == 1 or not bool(((x**k - linear * x - constant) % p == 0).any()):
                return torch.tensor([constant, linear, *[0] * (k - 2)][:k])
    raise AssertionError(f"every field has irreducible polynomials, but none of degree {k} was found mod {p}")
