"""The concentration of a von Mises-Fisher distribution from n unit vectors whose mean has length R.

    l(kappa) = n (kappa R + log C_p(kappa)),    l' = 0:  A(kappa) = R,    A = I_{p/2} / I_{p/2 - 1},   A' = 1 - A^2 - (p - 1) A / kappa

Newton's method from kappa_0 = R (p - R^2) / (1 - R^2) (Banerjee et al. 2005), kept between the bounds R (p - 2) / (1 - R^2) and R p / (1 - R^2); two
steps already give twelve digits. The likelihood of R alone, n log C_p(kappa) - log C_p(n R kappa), has its maximum at A(kappa) = R A(n R kappa)
(Schou 1978): it takes back what n random directions add to R, and where there is no root but 0 the data do not tell kappa from 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import torch

from dither.special.log_bessel import bessel_ratio, log_iv

ESTIMATORS = ("likelihood", "marginal")


@dataclass(frozen=True)
class Fit:
    """What n samples in R^p say: ``mean_length`` R, the estimate, the steps that it took."""

    concentration: float
    mean_length: float
    samples: int
    dimension: int
    estimator: str
    steps: int

    @property
    def log_likelihood(self) -> float:
        """Of all samples, at the estimate."""
        return self.samples * (self.concentration * self.mean_length + _log_normalizer(self.concentration, self.dimension))

    @property
    def standard_error(self) -> float:
        """Of the concentration: 1 / sqrt(n A'), from the information at the estimate."""
        return 1 / math.sqrt(self.samples * _slope(self.concentration, self.dimension))

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Concentrations whose likelihood, given the length of the mean, is within the chi-square bound of its maximum; the lower end may be 0.

        From the marginal likelihood for both estimators: around the maximum likelihood an interval would miss the truth wherever p is large.
        """
        _check_level(level)
        n, r, p = self.samples, self.mean_length, self.dimension
        centre = self.concentration if self.estimator == "marginal" else _marginal(r, n, p, self.concentration)[0]
        start = max(centre, 1e-3 * self.concentration)
        bound = NormalDist().inv_cdf(0.5 + level / 2) ** 2 / 2

        def inside(kappa: float) -> bool:
            return _marginal_likelihood(start, r, n, p) - _marginal_likelihood(kappa, r, n, p) < bound

        low, high = start, start
        while inside(low) and low > 1e-6 * start:
            low /= 2
        while inside(high):
            high *= 2
        return (0.0 if inside(low) else _bisect(inside, start, low), _bisect(inside, start, high))

    def direction_angle(self, level: float = 0.95) -> float:
        """Half the opening angle, in radians, of the cone around the fitted direction that holds the true one.

        Given its length, the mean's direction is von Mises-Fisher around the true one with concentration n R kappa: this is a quantile of that angle.
        """
        _check_level(level)
        return _angle_quantile(self.samples * self.mean_length * self.concentration, self.dimension, level)


def fit_concentration(mean_length: float, n: int, p: int, estimator: str = "likelihood") -> Fit:
    """The estimate from the length R of the mean of ``n`` unit vectors in R^p. ValueError where R is not between 0 and 1, or kappa is not above 0."""
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator: must be {' or '.join(map(repr, ESTIMATORS))}, not {estimator!r}")
    r = mean_length
    if not r < 1 - 1e-15:
        raise ValueError(f"features: the mean has length {r:g}: all samples are equal, and the concentration is infinite")
    if not r > 0:
        raise ValueError("features: the mean vanishes: there is no direction, and the concentration is 0")
    kappa, steps = _maximum(r, p)
    if estimator == "marginal":
        kappa, steps = _marginal(r, n, p, kappa)
        if kappa == 0:
            raise ValueError(f"features: a mean of length {r:g} is no longer than that of {n} random directions in R^{p}: the concentration is 0")
    return Fit(kappa, r, n, p, estimator, steps)


def _maximum(r: float, p: int) -> tuple[float, int]:
    """The root of A(kappa) = r."""
    spread = (1 - r) * (1 + r)
    low, high = r * (p - 2) / spread, r * p / spread
    kappa = r * (p - r * r) / spread
    for step in range(1, 21):
        a = _ratio(kappa, p)
        low, high = (kappa, high) if a < r else (low, kappa)
        moved = kappa - (a - r) / _slope(kappa, p)
        if not low <= moved <= high:
            moved = (low + high) / 2
        if abs(moved - kappa) < 1e-14 * kappa:
            return moved, step
        kappa = moved
    return kappa, 20


def _marginal(r: float, n: int, p: int, highest: float) -> tuple[float, int]:
    """The root of A(kappa) = r A(n r kappa) below ``highest``, the maximum likelihood, by bisection; 0 where there is none."""
    if n * r * r <= 1:
        return 0.0, 0
    low, high, steps = 0.0, highest, 0
    while high - low > 1e-14 * high:
        middle, steps = (low + high) / 2, steps + 1
        low, high = (middle, high) if _ratio(middle, p) < r * _ratio(n * r * middle, p) else (low, middle)
    return (low + high) / 2, steps


def _marginal_likelihood(kappa: float, r: float, n: int, p: int) -> float:
    return n * _log_normalizer(kappa, p) - _log_normalizer(n * r * kappa, p)


def _log_normalizer(kappa: float, p: int) -> float:
    v = p / 2 - 1
    return v * math.log(kappa) - (v + 1) * math.log(2 * math.pi) - float(log_iv(v, kappa))


def _ratio(kappa: float, p: int) -> float:
    return float(bessel_ratio(p / 2 - 1, kappa))


def _slope(kappa: float, p: int) -> float:
    """A'(kappa)."""
    x = torch.tensor(kappa, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(bessel_ratio(p / 2 - 1, x), x)
    return float(slope)


def _bisect(inside: Callable[[float], bool], within: float, outside: float) -> float:
    while abs(outside - within) > 1e-12 * abs(within):
        middle = (within + outside) / 2
        within, outside = (middle, outside) if inside(middle) else (within, middle)
    return within


def _angle_quantile(kappa: float, p: int, level: float) -> float:
    """Of theta with density exp(kappa cos theta) sin(theta)^(p-2), by the trapezoidal rule over 12 widths around the mode."""
    ratio = (p - 2) / (2 * kappa)  # kappa sin^2 = (p - 2) cos at the mode
    cosine = 1 / (ratio + math.hypot(1, ratio))
    square = (1 - cosine) * (1 + cosine) if ratio > 1e-8 else 2 * ratio  # sin^2, which is (p - 2) / kappa cos
    width = 12 / math.sqrt(kappa * cosine + ((p - 2) / square if p > 2 else 0))
    top = math.asin(math.sqrt(square)) if p > 2 else 0.0
    theta = torch.linspace(max(0.0, top - width), min(math.pi, top + width), 20001, dtype=torch.float64)
    change = -2 * kappa * torch.sin((theta + top) / 2) * torch.sin((theta - top) / 2)  # kappa (cos theta - cos top)
    density = change + (p - 2) * (torch.log(torch.sin(theta)) - math.log(math.sin(top))) if p > 2 else change
    mass = torch.cumulative_trapezoid(density.exp(), theta)
    return float(theta[1 + int(torch.searchsorted(mass, level * mass[-1]))])


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level: must be between 0 and 1, not {level:g}")
