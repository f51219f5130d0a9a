"""The polynomials of Debye's uniform expansions of I_v and K_v, exactly.

    u_0 = 1,   u_{k+1}(t) = t^2 (1 - t^2) u_k'(t) / 2 + (1/8) int_0^t (1 - 5 s^2) u_k(s) ds
    v_0 = 1,   v_{k+1}(t) = u_{k+1}(t) - t (1 - t^2) u_k(t) / 2 - t^2 (1 - t^2) u_k'(t)
    w_{k+1}(t) = (v_{k+1} - u_{k+1}) / (1 - t^2) = -t u_k(t) / 2 - t^2 u_k'(t)

u_k and v_k (DLMF 10.41.9 to 10.41.11) are t^k times a polynomial of degree k in t^2, w_k is t^k times one of degree k - 1. They are computed in
rational arithmetic, once, and only then rounded: the coefficients of u_20 reach 1e23 and alternate, so a recurrence in floating point would lose all
digits. With y = 1 / sqrt(v^2 + x^2) and tau = t^2 = (v y)^2, u_k(t) / v^k = y^k p_k(tau), which needs no division by v.

w_k is what makes the ratio I_{v+1} / I_v = x / (v + 1/y) + x y W / U free of cancellation: v_k / u_k would give it as a difference.
"""

from __future__ import annotations

from fractions import Fraction
from functools import cache

import torch
from torch import Tensor

Polynomial = tuple[Fraction, ...]  # coefficients of t^(k + 2 j), j = 0, 1, ...


@cache
def debye_u(k: int) -> Polynomial:
    """``[k + 1]`` coefficients of t^k, t^(k+2), ..., t^(3k) in u_k. ValueError for k < 0."""
    if k < 0:
        raise ValueError(f"k: must be at least 0, not {k}")
    if k == 0:
        return (Fraction(1),)
    made = [Fraction(0)] * (k + 1)
    for j, c in enumerate(debye_u(k - 1)):
        power = k - 1 + 2 * j
        made[j] += c * Fraction(power, 2) + c / (8 * (power + 1))  # t^(power + 1)
        made[j + 1] -= c * Fraction(power, 2) + 5 * c / (8 * (power + 3))  # t^(power + 3)
    return tuple(made)


@cache
def debye_w(k: int) -> Polynomial:
    """``[k]`` coefficients of t^k, ..., t^(3k-2) in w_k = (v_k - u_k) / (1 - t^2), k >= 1."""
    if k < 1:
        raise ValueError(f"k: must be at least 1, not {k}")
    return tuple(-c * (Fraction(1, 2) + k - 1 + 2 * j) for j, c in enumerate(debye_u(k - 1)))


@cache
def debye_v(k: int) -> Polynomial:
    """``[k + 1]`` coefficients of t^k, ..., t^(3k) in v_k."""
    if k == 0:
        return debye_u(0)
    w = (Fraction(0), *debye_w(k), Fraction(0))
    return tuple(u + w[j + 1] - w[j] for j, u in enumerate(debye_u(k)))


def debye_table(terms: int) -> tuple[Tensor, Tensor]:
    """``(u, w)``, each ``[terms, terms + 1]`` float64: row k - 1 has the coefficients of p_k and of w_k's polynomial, lowest power of t^2 first, and
    zeros behind them."""
    rows = [(_row(debye_u(k), terms), _row(debye_w(k), terms)) for k in range(1, terms + 1)]
    u, w = zip(*rows, strict=True)
    return torch.tensor(u, dtype=torch.float64), torch.tensor(w, dtype=torch.float64)


def _row(polynomial: Polynomial, terms: int) -> list[float]:
    return [float(c) for c in polynomial] + [0.0] * (terms + 1 - len(polynomial))
