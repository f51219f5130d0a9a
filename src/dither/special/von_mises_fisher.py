"""The von Mises-Fisher distribution on the unit sphere in R^p, p from 2 to tens of thousands.

    f(y) = C_p(kappa) exp(kappa mu^T y),    log C_p = v log kappa - (p/2) log(2 pi) - log I_v(kappa),    v = p/2 - 1

The log density never forms I_v, so nothing overflows where `scipy.stats.vonmises_fisher` does. Its error is a few units in the last place of
kappa, since kappa mu^T y and log I_v(kappa) are both of that size. Mean cosine and entropy: A = I_{p/2} / I_{p/2 - 1}, and -log C_p - kappa A.

Samples: the cosine w = mu^T y by rejection from a transformed beta variable (Ulrich 1984, Wood 1994; two of three tries succeed or more), the rest
uniformly on the sphere orthogonal to mu. Gradients of samples are exact, w through its distribution function F (dw/dkappa = -(dF/dkappa) / f).
Fitting: `special.von_mises_fisher_fit`. Sources: Mardia and Jupp, Directional Statistics; Plesner, Sorensen and Hauberg, arXiv 2409.08729.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Beta, Distribution, constraints

from dither.special.log_bessel import bessel_ratio, log_iv
from dither.special.von_mises_fisher_fit import Fit, fit_concentration

NODES = 64  # of the quadrature behind the gradient of a sample


class VonMisesFisher(Distribution):
    """``loc [..., p]`` mean directions of length 1, ``concentration [...]`` kappa > 0; batch and event shapes as in `torch.distributions`.

    Computes in float64 and returns the type of ``loc``. ValueError for p < 2, and, with ``validate_args``, for kappa <= 0 and
    directions that are not of length 1 to 1e-4. ``fitted`` tells of the fit, where `fit` made the object.
    """

    arg_constraints = {"loc": constraints.real_vector, "concentration": constraints.positive}  # noqa: RUF012
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, loc: Tensor, concentration: Tensor | float, *, fitted: Fit | None = None, validate_args: bool = True) -> None:
        if loc.dim() < 1 or loc.shape[-1] < 2:
            raise ValueError(f"loc: shape {list(loc.shape)}, must be [..., p] with p >= 2")
        if not loc.is_floating_point():
            raise ValueError(f"loc: must hold floating point numbers, not {loc.dtype}")
        given = torch.as_tensor(concentration, dtype=torch.float64, device=loc.device)
        batch = np.broadcast_shapes(tuple(loc.shape[:-1]), tuple(given.shape))
        self.loc = loc.expand(*batch, loc.shape[-1])
        self.concentration = given.expand(batch)
        self.fitted = fitted
        # told, since torch's default changes: torch.compile turns it off for the whole process
        super().__init__(torch.Size(batch), loc.shape[-1:], validate_args=validate_args)
        if self._validate_args:
            _check_unit("loc", loc.detach())

    @classmethod
    def fit(cls, features: Any, *, normalize: bool = False, estimator: str = "likelihood") -> VonMisesFisher:
        """The distribution of the rows of ``features [n, p]``, a tensor or an array, in O(n p) time and one float64 copy of a few rows.

        ``estimator="likelihood"`` is maximum likelihood, whose kappa is too large where n is not much larger than p / A^2 (the mean of n random
        vectors has a length); ``"marginal"`` maximises the likelihood of the length of the mean alone (Schou 1978), which corrects for that.
        ``normalize`` scales rows to length 1. The result's ``fitted`` has intervals. ValueError for n < 2, p < 2, rows that are not finite, have no
        direction or not length 1, and samples that are all equal or whose mean vanishes.
        """
        rows = torch.as_tensor(features)
        if rows.dim() != 2 or rows.shape[0] < 2 or rows.shape[1] < 2:
            raise ValueError(f"features: shape {list(rows.shape)}, must be [n, p] with n >= 2 and p >= 2")
        if not rows.is_floating_point():
            raise ValueError(f"features: must hold floating point numbers, not {rows.dtype}")
        n, p = rows.shape
        total = torch.zeros(p, dtype=torch.float64, device=rows.device)
        for i in range(0, n, 256):
            part = rows[i : i + 256].detach().double()
            if not bool(part.isfinite().all()):
                raise ValueError(f"features: holds values that are not finite in rows {i} .. {i + len(part) - 1}")
            if normalize:
                length = part.norm(dim=1, keepdim=True)
                if bool((length == 0).any()):
                    raise ValueError(f"features: row {i + int((length == 0).flatten().nonzero()[0])} is zero and has no direction")
                part = part / length
            else:
                _check_unit("features", part, "; normalize=True scales rows")
            total += part.sum(0)
        mean = total / n
        fitted = fit_concentration(mean.norm().item(), n, p, estimator)
        loc = mean / mean.norm()
        return cls(loc.to(rows.dtype), fitted.concentration, fitted=fitted, validate_args=False)

    @property
    def dimension(self) -> int:
        """p."""
        return self.loc.shape[-1]

    @property
    def mean(self) -> Tensor:
        """``[..., p]``: A mu."""
        return (self.mean_cosine()[..., None] * self.loc.double()).to(self.loc.dtype)

    def mean_cosine(self) -> Tensor:
        """``[...]`` float64: A_p(kappa), the length of the mean."""
        ratio: Tensor = bessel_ratio(self.dimension / 2 - 1, self.concentration)
        return ratio

    def log_normalizer(self) -> Tensor:
        """``[...]`` float64: log C_p(kappa)."""
        v = self.dimension / 2 - 1
        value: Tensor = v * self.concentration.log() - (v + 1) * math.log(2 * math.pi) - log_iv(v, self.concentration)
        return value

    def log_prob(self, value: Any) -> Tensor:
        """``[...]`` for unit vectors ``value [..., p]``, with respect to the surface measure."""
        points = torch.as_tensor(value, device=self.loc.device)
        if points.dim() < 1 or points.shape[-1] != self.dimension:
            raise ValueError(f"value: shape {list(points.shape)}, must be [..., {self.dimension}]")
        if self._validate_args:
            _check_unit("value", points.detach())
        cosine = (points.double() * self.loc.double()).sum(-1)
        return (self.concentration * cosine + self.log_normalizer()).to(self.loc.dtype)

    def entropy(self) -> Tensor:
        """``[...]``, with respect to the surface measure."""
        return (-self.log_normalizer() - self.concentration * self.mean_cosine()).to(self.loc.dtype)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """``[*sample_shape, ..., p]``, differentiable in ``loc`` and ``concentration``."""
        shape = torch.Size(sample_shape) + self.batch_shape
        kappa = self.concentration.expand(shape)
        w = _Cosine.apply(kappa, self.dimension)  # type: ignore[no-untyped-call]
        loc = self.loc.double().expand(*shape, self.dimension)
        noise = torch.randn(*shape, self.dimension, dtype=torch.float64, device=loc.device)
        tangent = noise - (noise * loc).sum(-1, keepdim=True) * loc
        tangent = tangent / tangent.norm(dim=-1, keepdim=True)
        points: Tensor = w[..., None] * loc + torch.sqrt((1 - w) * (1 + w))[..., None] * tangent
        return points.to(self.loc.dtype)


class _Cosine(torch.autograd.Function):
    """Samples of mu^T y for each kappa; the density of theta = arccos w is proportional to exp(kappa cos theta) sin(theta)^(p-2)."""

    @staticmethod
    def forward(ctx: Any, kappa: Tensor, p: int) -> Tensor:
        w = _cosines(kappa.detach().reshape(-1), p).reshape(kappa.shape)
        ctx.save_for_backward(kappa, w)
        ctx.dimension = p
        return w

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        kappa, w = ctx.saved_tensors
        return gradient * cosine_gradient(kappa, w, ctx.dimension), None


def _cosines(kappa: Tensor, p: int) -> Tensor:
    """One cosine for each of ``kappa [N]``."""
    b = (p - 1) / (2 * kappa + torch.hypot(2 * kappa, torch.full_like(kappa, p - 1)))
    x0 = (1 - b) / (1 + b)
    c = kappa * x0 + (p - 1) * (torch.log(4 * b) - 2 * torch.log1p(b))  # log(1 - x0^2), where x0 may be next to 1
    beta = Beta((p - 1) / 2 * torch.ones((), dtype=kappa.dtype, device=kappa.device), (p - 1) / 2)
    w, left = torch.empty_like(kappa), torch.arange(len(kappa), device=kappa.device)
    while len(left):
        z = beta.sample(left.shape)
        k, q = kappa[left], b[left]
        tried = (1 - (1 + q) * z) / (1 - (1 - q) * z)
        u = torch.rand_like(z)
        accepted = k * tried + (p - 1) * torch.log1p(-x0[left] * tried) - c[left] >= torch.log(u)
        w[left[accepted]] = tried[accepted]
        left = left[~accepted]
    return w.clamp(-1, 1)


def cosine_gradient(kappa: Tensor, w: Tensor, p: int) -> Tensor:
    """``dw / dkappa`` at a fixed quantile: sin(theta) / f(theta) int_0^theta (cos s - A) f(s) ds, by Gauss and Legendre from theta to where f is
    negligible, on the side where f falls."""
    theta = torch.arccos(w)
    cosine = bessel_ratio(p / 2 - 1, kappa)
    mode = (p - 2) / (2 * kappa)  # cos of the mode: kappa sin^2 = (p - 2) cos
    top = torch.arccos((torch.sqrt(mode * mode + 1) - mode).clamp(max=1))
    width = 12 / torch.sqrt(kappa * top.cos() + (p - 2) / top.sin().clamp_min(1e-30) ** 2 if p > 2 else kappa * top.cos() + 1)
    below = theta < top
    length = torch.where(below, torch.minimum(theta, width), torch.minimum(math.pi - theta, width))
    nodes, weights = (torch.as_tensor(a, dtype=theta.dtype, device=theta.device) for a in np.polynomial.legendre.leggauss(NODES))
    distance = length[..., None] * (1 + nodes) / 2  # [..., NODES]
    s = torch.where(below[..., None], theta[..., None] - distance, theta[..., None] + distance)
    # cos s - cos theta and sin s / sin theta without cancellation
    half = (s - theta[..., None]) / 2
    change = -2 * torch.sin(theta[..., None] + half) * torch.sin(half)
    sine = torch.sin(theta)[..., None]
    f = torch.exp(kappa[..., None] * change + (p - 2) * (torch.log(torch.sin(s)) - torch.log(sine)))
    integral = ((w[..., None] + change - cosine[..., None]) * f * weights).sum(-1) * length / 2
    gradient: Tensor = torch.sin(theta) * torch.where(below, integral, -integral)
    return gradient


def _check_unit(name: str, rows: Tensor, hint: str = "") -> None:
    error = (rows.double().norm(dim=-1) - 1).abs().max() if rows.numel() else torch.zeros(())
    if not bool(error <= 1e-4):
        raise ValueError(f"{name}: must hold vectors of length 1, but a length is off by {error.item():.3g}{hint}")
