"""The constants that the Bessel kernels read, each computed here to 40 digits before it is rounded.

- Debye's polynomials (`special.debye`);
- the Taylor coefficients of 1 / Gamma(1 + a) = sum c_k a^k, an entire function, so that 24 of them give every bit for |a| <= 1/2:
      c_0 = 1,   k c_k = gamma c_{k-1} - zeta(2) c_{k-2} + zeta(3) c_{k-3} - ...   (DLMF 5.7.2)
- a logarithm in two parts: for m in [1, 2) with its first seven fraction bits i, c_i of ten bits near 1 / m, and -log c_i as a sum of two doubles;
- the nodes t_j = j / 8, cosh t_j - 1 and exp(+-t_j) of the trapezoidal rule for K_v.
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
    """``[LOG_STEPS + 1, 3]`` float64: c_i, and -log c_i as high and low part; the last row has log 2 in the same parts.

    High parts are multiples of 2^-42, so that ``k log 2 + -log c_i`` is exact in them. The first c is 1 and the last 1/2: near 1, from both sides,
    nothing is added to the polynomial.
    """
    inverses = [round(1024 / (1 + (i + 0.5) / LOG_STEPS)) / 1024 for i in range(LOG_STEPS)]
    inverses[0], inverses[-1] = 1.0, 0.5
    rows = []
    with localcontext() as context:
        context.prec = DIGITS
        for c in [*inverses, 0.5]:
            exact = -Decimal(c).ln()
            high = round(float(exact) * 2**42) / 2**42
            rows.append((c, high, float(exact - Decimal(high))))
    return torch.tensor(rows, dtype=torch.float64)


def nodes() -> Tensor:
    """``[NODES, 4]`` float64: t_j = j / 8, cosh t_j - 1, exp(-t_j) and exp(t_j)."""
    rows = []
    with localcontext() as context:
        context.prec = DIGITS
        for j in range(NODES):
            grown = (Decimal(j) / 8).exp()
            rows.append((j / 8, float((grown + 1 / grown) / 2 - 1), float(1 / grown), float(grown)))
    return torch.tensor(rows, dtype=torch.float64)
