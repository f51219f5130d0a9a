"""What the Bessel kernel and its reference share: the regions by name and the sizes of the tables."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

TERMS = 20  # of Debye's expansion at most
GAMMA_TERMS = 24
LOG_STEPS = 32
NODES = 41

# Hankel's expansion with 3 and 20 terms, Debye's with 4 to 20, small arguments up to 1, 3, 8 and 30, and 0, infinity and NaN
REGIONS = ("mu_3", "mu_20", "U_4", "U_6", "U_7", "U_9", "U_13", "U_20", "small_1", "small_3", "small_8", "small_30", "limit")
MU_3, MU_20, U_4, U_6, U_7, U_9, U_13, U_20, SMALL_1, SMALL_3, SMALL_8, SMALL_30, LIMIT = range(len(REGIONS))
HANKEL = {MU_3: 3, MU_20: 20}
DEBYE = {U_4: 4, U_6: 6, U_7: 7, U_9: 9, U_13: 13, U_20: 20}
SERIES = {SMALL_1: 12, SMALL_3: 17, SMALL_8: 26, SMALL_30: 46}  # terms of the power series of I
TRAPEZOID = {SMALL_3: 41, SMALL_8: 32, SMALL_30: 25}  # nodes of the integral of K
TEMME = 12  # terms of the series of K for x <= 1


class BesselTables(NamedTuple):
    """Constants that the kernels read (`dither.special.bessel_tables` makes them)."""

    u: Tensor  # [TERMS, TERMS + 1] Debye's polynomials in t^2
    w: Tensor  # [TERMS, TERMS + 1] those of the ratio
    gamma: Tensor  # [GAMMA_TERMS] Taylor coefficients of 1 / Gamma(1 + a)
    logs: Tensor  # [3, LOG_STEPS + 1] 1 / m to ten bits, its logarithm in two parts
    nodes: Tensor  # [NODES, 2] t and cosh t - 1
