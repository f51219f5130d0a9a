"""Optimisers for orthogonal matrices: Riemannian Adam (OSTQuant) and Cayley SGD (SpinQuant).

`RiemannianAdam` (Becigneul and Ganea, ICLR 2019, on the Stiefel manifold with its canonical metric, as OSTQuant, arXiv 2501.13987, uses it).
For X orthogonal [n, n] with the Euclidean gradient G:

    D = G - X G^T X                                               the Riemannian gradient
    m <- b1 m + (1 - b1) D
    v <- b2 v + (1 - b2) <D, D>_X                                 one number a matrix; <D, D>_X = ||D||_F^2 - ||X^T D||_F^2 / 2
    U = -lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
    A = U X^T - X U^T                                             skew
    X <- (I - A/2)^(-1) (I + A/2) X,    m likewise                Cayley retraction; m is carried along
    every 10 steps:  X <- U_s V_s^T of its SVD,    m <- (m - X m^T X) / 2, the tangent space's projection

For a square X, A X = 2 U to first order: the step is twice what ``lr`` says. That is the published method, whose rates were tuned with
it. Cost: one solve with 2 n right-hand sides a step, 14/3 n^3 multiply-adds.

`CayleySGD` (Li, Fuxin and Todorovic, ICLR 2020, as in SpinQuant, arXiv 2405.16406):

    M <- mu M - G
    What = M X^T - X (X^T M X^T) / 2,    W = What - What^T,    alpha = min(lr, 1 / (||W||_1 + 1e-8))
    Y <- X + alpha M,    5 times  Y <- X + (alpha / 2) W (X + Y),    X <- Y          the Cayley retraction as a fixed point
    M <- W X                                                                         what W X says of M is kept: its tangent part
    with probability 1/101 before a step:  X <- Q of its QR factorisation

Five iterations leave X orthogonal only to about (alpha ||W|| / 2)^6, hence the factorisations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

TINY = 1e-8  # added to the norm of W


class RiemannianAdam(Optimizer):
    """Adam over orthogonal matrices and, in groups with ``orthogonal=False``, plain Adam over numbers.

    Parameters of orthogonal groups are ``[..., n, n]``, any number of matrices at once. Everything is computed in ``precision`` (float64
    unless told otherwise: float32 solves lose 1e-4 of orthogonality in 100 steps); parameters keep their own type.

        RiemannianAdam([{"params": rotations}, {"params": scales, "orthogonal": False, "lr": 0.00179}])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.0169,  # of rotations, searched on an 8B model; 0.00179 for scales
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        orthogonal: bool = True,
        stabilize: int = 10,
        precision: torch.dtype = torch.float64,
    ) -> None:
        if not lr >= 0:
            raise ValueError(f"lr must not be negative, but is {lr}")
        if not all(0 <= b < 1 for b in betas):
            raise ValueError(f"betas must be within [0, 1), not {betas}")
        if not eps >= 0:
            raise ValueError(f"eps must not be negative, but is {eps}")
        if stabilize < 1:
            raise ValueError(f"stabilize must be at least 1, not {stabilize}")
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "orthogonal": orthogonal,
                "stabilize": stabilize,
                "precision": precision,
            },
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if self.param_groups[-1]["orthogonal"]:
            _check_orthogonal(self.param_groups[-1]["params"])

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        (b1, b2), precision, orthogonal = group["betas"], group["precision"], group["orthogonal"]
        x, g = parameter.to(precision), parameter.grad.to(precision)  # type: ignore[union-attr]
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["m"] = torch.zeros_like(x)
            state["v"] = torch.zeros_like(x[..., :1, :1] if orthogonal else x)
        state["step"] += 1
        t, m, v = state["step"], state["m"].to(precision), state["v"].to(precision)
        d = g - x @ g.mT @ x if orthogonal else g
        m = b1 * m + (1 - b1) * d
        v = b2 * v + (1 - b2) * (canonical_square(x, d) if orthogonal else d.square())
        u = -group["lr"] * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + group["eps"])
        if not orthogonal:
            x = x + u
        else:
            x, m = cayley(u @ x.mT - x @ u.mT, x, m)
            if t % group["stabilize"] == 0:
                x = nearest_orthogonal(x)
                m = (m - x @ m.mT @ x) / 2
        state["m"], state["v"] = m, v
        parameter.copy_(x)


class CayleySGD(Optimizer):
    """SpinQuant's optimiser of orthogonal matrices ``[..., n, n]``; ``seed`` decides when they are factorised anew."""

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1.5,
        momentum: float = 0.0,
        *,
        iterations: int = 5,
        seed: int = 0,
        precision: torch.dtype = torch.float64,
    ) -> None:
        if not lr >= 0:
            raise ValueError(f"lr must not be negative, but is {lr}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be within [0, 1), not {momentum}")
        if iterations < 1:
            raise ValueError(f"iterations must be at least 1, not {iterations}")
        self.generator = torch.Generator().manual_seed(seed)
        super().__init__(params, {"lr": lr, "momentum": momentum, "iterations": iterations, "precision": precision})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        _check_orthogonal(self.param_groups[-1]["params"])

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    anew = int(torch.randint(101, (), generator=self.generator)) == 0
                    self._update(parameter, group, anew)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any], anew: bool) -> None:
        precision = group["precision"]
        x, g = parameter.to(precision), parameter.grad.to(precision)  # type: ignore[union-attr]
        if anew:
            q, r = torch.linalg.qr(x)
            x = q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]  # the Q near X
        state = self.state[parameter]
        m = group["momentum"] * state["m"].to(precision) - g if state else -g
        half = m @ x.mT
        half = half - x @ (x.mT @ half) / 2
        w = half - half.mT
        norm = w.abs().sum(-2).amax(-1)[..., None, None]  # ||W||_1, the largest column sum
        alpha = (1 / (norm + TINY)).clamp(max=group["lr"])
        y = x + alpha * m
        for _ in range(group["iterations"]):
            y = x + alpha / 2 * (w @ (x + y))
        state["m"] = w @ x
        parameter.copy_(y)


def canonical_square(x: Tensor, d: Tensor) -> Tensor:
    """``<D, D>_X = ||D||_F^2 - ||X^T D||_F^2 / 2``: ``[..., 1, 1]`` of ``[..., n, n]``."""
    return d.square().sum((-2, -1), keepdim=True) - (x.mT @ d).square().sum((-2, -1), keepdim=True) / 2


def cayley(a: Tensor, *vectors: Tensor) -> tuple[Tensor, ...]:
    """``(I - A/2)^(-1) (I + A/2) Y`` for each Y ``[..., n, n]``, orthogonal maps for a skew A ``[..., n, n]``. One factorisation for all."""
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    y = torch.cat(vectors, -1)
    solved: Tensor = torch.linalg.solve(eye - a / 2, y + a @ y / 2)
    return tuple(torch.tensor_split(solved, len(vectors), -1))


def nearest_orthogonal(x: Tensor) -> Tensor:
    """``U V^T`` of the SVD ``x = U S V^T``."""
    u, _, vh = torch.linalg.svd(x)
    nearest: Tensor = u @ vh
    return nearest


def _check_orthogonal(parameters: list[Tensor]) -> None:
    for p in parameters:
        if p.dim() < 2 or p.shape[-1] != p.shape[-2]:
            raise ValueError(f"params of an orthogonal group must be [..., n, n], not {list(p.shape)}")
        x = p.detach().double()
        error = (
            float((x @ x.mT - torch.eye(p.shape[-1], dtype=x.dtype, device=x.device)).abs().max()) if x.numel() else 0.0
        )
        if not error < 1e-3:
            raise ValueError(f"params of an orthogonal group must be orthogonal; one is off by {error:.1e}")
