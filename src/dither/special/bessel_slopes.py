"""The derivative in x of the ratios A = I_{v+1} / I_v and B = K_{v-1} / K_v, in torch, from the same expressions as the ratios.

    d log I_v / dx = v/x + A,    A' = 1 - A^2 - (2 v + 1) A / x
    d log K_v / dx = -(v/x + B), B' = B^2 + (2 v - 1) B / x - 1      (both from the Bessel equation)

For x >> 1 these are differences of numbers near 1 that leave something like 1 / x^2, so the expansions are differentiated instead:

    Hankel   (log)'' = y^2 / 2 + y^2 ((D + E) / (1 + s) - D^2 / (1 + s)^2),   y = 1/x, s = sum c_k, D = sum k c_k, E = sum k^2 c_k
    Debye    A = x / (v + w) + (x / w) R,  R = W / U:
             A' = v / (w (v + w)) + v^2 / w^3 R + (x / w) R',   and d/dx of y^k p_k(tau) is -x y^2 y^k sum_j (k + 2 j) c_kj tau^j
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from dither.kernels.bessel import TERMS, BesselTables
from dither.kernels.bessel_reference import classify, double_horner, hankel_sums
from dither.kernels.bessel_shapes import DEBYE, HANKEL
from dither.special.bessel_tables import tables_on


def ratio_slope(kind: str, v: Tensor, x: Tensor, ratio: Tensor) -> Tensor:
    """A' (``kind="I"``) or B' (``"K"``) for ``v, x, ratio [N]`` float64, where ``ratio`` is A or B."""
    slope = 1 - ratio * ratio - (2 * v + 1) * ratio / x if kind == "I" else ratio * ratio + (2 * v - 1) * ratio / x - 1
    regions = classify(v, x)
    tables, slopes = tables_on(v.device), _slope_tables(v.device)
    for code, terms in (*HANKEL.items(), *DEBYE.items()):
        places = (regions == code).nonzero().squeeze(1)
        if places.numel():
            p, q = v[places], x[places]
            slope[places] = _hankel(kind, terms, p, q) if code in HANKEL else _debye(kind, terms, p, q, tables, slopes)
    return slope


def _hankel(kind: str, terms: int, v: Tensor, x: Tensor) -> Tensor:
    s, d, e = hankel_sums(kind, terms, v, x)
    y = 1 / x
    curvature = y * (0.5 * y + y * ((d + e) / (1 + s) - (d / (1 + s)) ** 2))
    return curvature + v * y * y if kind == "I" else v * y * y - curvature


def _debye(kind: str, terms: int, v: Tensor, x: Tensor, tables: BesselTables, slopes: tuple[Tensor, Tensor]) -> Tensor:
    w = torch.hypot(v, x)
    y = 1 / w
    signed = y if kind == "I" else -y
    tau = (v * y) ** 2
    u, r = (double_horner(table, terms, tau, signed) * signed for table in (tables.u, tables.w))
    du, dw = (double_horner(table, terms, tau, signed) * signed * (-x * y * y) for table in slopes)
    r = r / (1 + u)
    return v / (w * (v + w)) + (v * y) ** 2 * y * r + x * y * (dw - r * du) / (1 + u)


@cache
def _slope_tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """The coefficients of Debye's polynomials, each times its power of t: t d/dt."""
    k, j = torch.arange(1, TERMS + 1, device=device)[:, None], torch.arange(TERMS + 1, device=device)[None]
    tables = tables_on(device)
    return tables.u * (k + 2 * j), tables.w * (k + 2 * j)
