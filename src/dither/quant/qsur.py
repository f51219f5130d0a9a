"""Quantization space utilization rate: how much of the cube that a per-tensor quantizer spans the data fill. (OSTQuant, Hu et al., ICLR
2025, arXiv 2501.13987, section 3.)

Rows x ~ N(mu, Sigma) in R^d, eigenvalues lambda_1 >= ... >= lambda_d, q_1 the first eigenvector, c_d = pi^(d/2) / (2^d Gamma(d/2 + 1)) the
share that a ball has of its cube, chi^2 the quantile of the chi-square distribution with d degrees of freedom. QSUR is the volume of the
confidence ellipsoid over that of the cube; chi cancels while mu is neglected, as the paper does:

    paper      c_d prod sqrt(lambda_i) / (sqrt(lambda_1) max_j |q_1j|)^d     the cube spans the ends of the longest axis only
    exact      c_d prod sqrt(lambda_i) / max_i Sigma_ii^(d/2)                the cube spans the ellipsoid: chi sqrt(Sigma_ii) along axis i

and the best that linear maps can do:

    paper, rotated     c_d d^(d/2) prod sqrt(lambda_i) / lambda_1^(d/2)      |q_1j| = d^(-1/2)
    exact, rotated     c_d (GM(lambda) / AM(lambda))^(d/2)                   diag(Sigma) constant, as by R = Q H with H Hadamard
    whitened           c_d                                                   a rotation and a scaling: the ball in the cube

All results are logarithms per dimension, (1/d) log QSUR: QSUR itself underflows (c_576 is about 1e-615). Where the covariance has
no full rank, the ellipsoid has no volume and they are -inf. Cost: d^2 T + d^3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Qsur:
    """(1/d) log QSUR of one distribution: as it is, and the best over rotations, by either form; ``whitened`` is the best of all."""

    paper: float
    paper_rotated: float
    exact: float
    exact_rotated: float
    whitened: float


def qsur(x: Tensor) -> float:
    """(1/d) log QSUR of rows ``x [..., d]``, exact form, taken as a Gaussian of their covariance. See `qsur_of` for the other forms.

    Scaling by a number, sign flips and permutations of channels do not change it. ValueError for fewer than two rows, NaN and inf.
    """
    return qsur_of(x).exact


def qsur_of(x: Tensor) -> Qsur:
    """All forms for rows ``x [..., d]``: those of the Gaussian with their covariance."""
    if x.dim() < 2 or x.shape[-1] < 1:
        raise ValueError(f"x must be [T, d], not {list(x.shape)}")
    rows = x.detach().reshape(-1, x.shape[-1]).double()
    if len(rows) < 2:
        raise ValueError(f"x must have at least two rows, not {len(rows)}")
    if not bool(torch.isfinite(rows).all()):
        raise ValueError("x must be finite")
    rows = rows - rows.mean(0)
    return gaussian_qsur(rows.mT @ rows / len(rows))


def gaussian_qsur(covariance: Tensor, mean: Tensor | None = None, level: float = 0.99) -> Qsur:
    """All forms for N(mean, covariance ``[d, d]``).

    With a ``mean [d]`` the exact form's cube spans the ellipsoid of probability ``level`` where it lies, (max_i (mu_i + chi sqrt(Sigma_ii)) -
    min_i (mu_i - chi sqrt(Sigma_ii)))^d; without one, ``level`` does not matter. The other forms neglect the mean. If the
    largest eigenvalue is a multiple one, q_1 is any of its eigenvectors, and the paper's form is not unique.
    """
    sigma = covariance.detach().double()
    if sigma.dim() != 2 or sigma.shape[0] != sigma.shape[1] or len(sigma) < 1:
        raise ValueError(f"covariance must be [d, d], not {list(sigma.shape)}")
    if not bool(torch.isfinite(sigma).all()):
        raise ValueError("covariance must be finite")
    d = len(sigma)
    if mean is not None and mean.shape != (d,):
        raise ValueError(f"mean must be [{d}], not {list(mean.shape)}")
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, not {level}")
    eigenvalues, vectors = torch.linalg.eigh((sigma + sigma.mT) / 2)  # ascending
    largest = float(eigenvalues[-1])
    if float(eigenvalues[0]) < -1e-9 * abs(largest):
        raise ValueError(
            f"covariance must be positive semidefinite; its smallest eigenvalue is {float(eigenvalues[0]):.3g}"
        )
    ball = log_ball(d)
    if not float(eigenvalues[0]) > d * torch.finfo(torch.float64).eps * largest:  # what rounding leaves of a zero
        return Qsur(-math.inf, -math.inf, -math.inf, -math.inf, ball)
    axes = ball + 0.5 * float(eigenvalues.log().mean())  # log of c_d prod sqrt(lambda), per dimension
    longest = 0.5 * math.log(largest)
    return Qsur(
        paper=axes - longest - math.log(float(vectors[:, -1].abs().max())),
        paper_rotated=axes - longest + 0.5 * math.log(d),
        exact=axes - _log_half_side(sigma, mean, level),
        exact_rotated=axes - 0.5 * math.log(float(eigenvalues.mean())),
        whitened=ball,
    )


def _log_half_side(sigma: Tensor, mean: Tensor | None, level: float) -> float:
    """log of half the cube's side over chi."""
    deviation = sigma.diagonal().sqrt()
    if mean is None:
        return math.log(float(deviation.max()))
    chi, mu = math.sqrt(chi_square_quantile(len(sigma), level)), mean.detach().double()
    side = float((mu + chi * deviation).max() - (mu - chi * deviation).min())
    return math.log(side / (2 * chi))


def log_ball(d: int) -> float:
    """(1/d) log c_d, the share that a ball has of its cube in d dimensions."""
    return 0.5 * math.log(math.pi) - math.log(2) - math.lgamma(d / 2 + 1) / d


def chi_square_quantile(degrees: int, level: float) -> float:
    """The q with P(chi^2 <= q) = ``level``, by bisection of the regularised incomplete gamma function P(d/2, q/2)."""
    half = torch.tensor(degrees / 2, dtype=torch.float64)

    def below(q: float) -> float:
        return float(torch.special.gammainc(half, torch.tensor(q / 2, dtype=torch.float64)))

    low, high = 0.0, float(degrees)
    while below(high) < level:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) < level else (low, middle)
    return (low + high) / 2
