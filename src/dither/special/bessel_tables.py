"""The constants that the Bessel kernels read, each computed here to 40 digits before it is rounded.

- Debye's polynomials (`special.debye`);
- the Taylor coefficients of 1 / Gamma(1 + a) = sum c_k a^k, an entire function, so that 24 of them give every bit for |a| <= 1/2:
      c_0 = 1,   k c_k = gamma c_{k-1} - zeta(2) c_{k-2} + zeta(3) c_{k-3} - ...   (DLMF 5.7.2)
- a logarithm in two parts: for m in [3/4, 3/2] next to i / 32, c_i of ten bits near 1 / m, and -log c_i as a sum of two doubles;
- the nodes t_j = j / 8 and cosh t_j - 1 of the trapezoidal rule for K_v.
"""

from __future__ import annotations

from decimal import Decimal, localcontext
from functools import cache

import torch
from torch import Tensor

from dither.kernels.bessel import GAMMA_TERMS, LOG_STEPS, NODES, TERMS, BesselTables
from dither.special.debye import debye_table

EULER = "0.57721566490153286060651209008240243104215933593992"
DIGITS = 45


@cache
def bessel_tables() -> BesselTables:
    """All of them on the CPU; computed once, in some milliseconds."""
    u, w = debye_table(TERMS)
    return BesselTables(u, w, torch.tensor(reciprocal_gamma(GAMMA_TERMS), dtype=torch.float64), log_table(), nodes())


@cache
def tables_on(device: torch.device) -> BesselTables:
    """`bessel_tables`, copied to a device once."""
    return BesselTables(*(table.to(device) for table in bessel_tables()))


def reciprocal_gamma(count: int) -> list[float]:
    """The first ``count`` Taylor coefficients of 1 / Gamma(1 + a) at a = 0."""
    with localcontext() as context:
        context.prec = DIGITS
        zetas = [Decimal(EULER), *(zeta(n) for n in range(2, count + 1))]
        c = [Decimal(1)]
        for k in range(1, count):
            c.append(sum(((-1) ** j * zetas[j] * c[k - 1 - j] for j in range(k)), Decimal(0)) / k)
        return [float(value) for value in c]


def zeta(n: int) -> Decimal:
    """Riemann's zeta at an integer n >= 2 to the digits of the decimal context: the alternating sum, accelerated (Cohen, Rodriguez Villegas and
    Zagier, 2000, algorithm 1)."""
    terms = 70  # the error falls by 5.8 a term
    d = (3 + Decimal(8).sqrt()) ** terms
    d = (d + 1 / d) / 2
    b, c, total = Decimal(-1), -d, Decimal(0)
    for k in range(terms):
        c = b - c
        total += c / Decimal(k + 1) ** n
        b = b * (k + terms) * (k - terms) / (Decimal(2 * k + 1) / 2 * (k + 1))
    return total / d / (1 - Decimal(2) ** (1 - n))


def log_table() -> Tensor:
    """``[3, LOG_STEPS + 1]`` float64: in column i % 32, for i = 24 .. 48, c_i and -log c_i as high and low part; in the last column the same of 1/2.

    High parts are multiples of 2^-42, so that ``k log 2 + -log c_i`` is exact in them. At i = 32 c is 1: near 1 nothing is added to the polynomial.
    """
    inverses = [1.0] * LOG_STEPS + [0.5]
    for i in range(3 * LOG_STEPS // 4, 3 * LOG_STEPS // 2 + 1):
        inverses[i % LOG_STEPS] = round(1024 * LOG_STEPS / i) / 1024
    columns = []
    with localcontext() as context:
        context.prec = DIGITS
        for c in inverses:
            exact = -Decimal(c).ln()
            high = round(float(exact) * 2**42) / 2**42
            columns.append((c, high, float(exact - Decimal(high))))
    return torch.tensor(columns, dtype=torch.float64).mT.contiguous()


def nodes() -> Tensor:
    """``[NODES, 2]`` float64: t_j = j / 8 and cosh t_j - 1."""
    rows = []
    with localcontext() as context:
        context.prec = DIGITS
        for j in range(NODES):
            grown = (Decimal(j) / 8).exp()
            rows.append((j / 8, float((grown + 1 / grown) / 2 - 1)))
    return torch.tensor(rows, dtype=torch.float64)
