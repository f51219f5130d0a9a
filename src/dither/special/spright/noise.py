"""What is noise: quantiles of a bin's energy, and the noise of bins estimated from those that hold nothing else.

The mean square of P values of variance nu2 is nu2 chi2_d / d, with d = P degrees of freedom for real values and 2 P for complex ones. Offsets that
see the same samples count once.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np

from dither.special.spright.gf2 import Reals

LOWEST = 0.125  # the median of the lowest quartile of bins
TINY = 1e-18  # of the largest energy: what rounding leaves of a bin


def chi_square(quantile: float, freedom: float) -> float:
    """The quantile of chi2_d / d (Wilson and Hilferty, 1931); some per mille off for d of 10 and up."""
    spread = 2 / (9 * freedom)
    root: float = max(0.0, 1 - spread + NormalDist().inv_cdf(quantile) * math.sqrt(spread))
    return root**3


def margin(freedom: float) -> float:
    """gamma: a bin up to (1 + gamma) nu2 is noise. A half, or 2.5 standard deviations where few values make the mean."""
    return max(0.5, 2.5 * math.sqrt(2 / freedom))


def wide_margin(freedom: float, bins: int) -> float:
    """The gamma that all bins of pure noise stay under together in 99 of 100 runs."""
    return chi_square(1 - 0.01 / bins, freedom) - 1


def estimate(energies: Reals, freedom: float, empty: float) -> float:
    """nu2 from the mean squares of all bins, a share ``empty`` of which holds noise alone: from a low quantile, which other bins cannot reach."""
    low = float(np.quantile(energies, LOWEST))
    return low / chi_square(min(0.9, LOWEST / empty), freedom)
