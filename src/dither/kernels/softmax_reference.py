"""softmax, log-softmax and log-sum-exp of rows in torch: what the C++ kernels must agree with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOWEST = -1e6  # inputs are raised to it, as in C++


def softmax_rows_reference(x: Tensor, algorithm: str) -> Tensor:
    """Arguments as `dither.kernels.softmax_rows`. All algorithms but ``two_pass`` are one sum here: they differ in memory traffic only."""
    wide = _wide(x)
    by_maximum = _by_maximum(wide)
    if algorithm != "two_pass":
        return by_maximum.to(x.dtype)
    m, n = _extended(wide)
    mantissa, exponent = _sum(m, n)
    y = torch.ldexp(m / mantissa, n - exponent)
    return torch.where(_in_domain(mantissa, exponent), y, by_maximum).to(x.dtype)


def log_softmax_rows_reference(x: Tensor) -> Tensor:
    """x - high - low, log-sum-exp in two pieces, as in C++."""
    wide = _wide(x)
    mantissa, exponent = _sum(*_extended(wide))
    whole = mantissa.double().log() + exponent.double() * math.log(2)
    high = whole.to(wide.dtype)
    y = ((wide - high) - (whole - high).to(wide.dtype)).clamp(max=0)
    return torch.where(_in_domain(mantissa, exponent), y, wide.log_softmax(-1)).to(x.dtype)


def logsumexp_rows_reference(x: Tensor) -> Tensor:
    """``[R]`` float32, of float64 rows float64."""
    wide = _wide(x)
    mantissa, exponent = _sum(*_extended(wide))
    whole = (mantissa.double().log() + exponent.double() * math.log(2)).to(wide.dtype)
    return torch.where(_in_domain(mantissa, exponent), whole, wide.logsumexp(-1, keepdim=True))[:, 0]


def softmax_gradient_rows_reference(y: Tensor, g: Tensor) -> Tensor:
    """y (g - <g, y>)."""
    wide, gradient = _wide(y), _wide(g)
    dot = (wide * gradient).sum(-1, keepdim=True, dtype=torch.float64).to(wide.dtype)
    return (wide * (gradient - dot)).to(y.dtype)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _extended(x: Tensor) -> tuple[Tensor, Tensor]:
    """e^x = m 2^n. The reduction is done in float64: torch has no fused product that would do it in float32."""
    raised = x.clamp(min=LOWEST)
    n = (raised * math.log2(math.e)).round()
    return (raised.double() - n.double() * math.log(2)).exp().to(x.dtype), n


def _sum(m: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """Of a row, again extended; ``[R, 1]`` each."""
    exponent = n.amax(-1, keepdim=True)
    return torch.ldexp(m, n - exponent).sum(-1, keepdim=True, dtype=torch.float64).to(m.dtype), exponent


def _in_domain(mantissa: Tensor, exponent: Tensor) -> Tensor:
    """Where neither what was raised nor the coarseness of large numbers reaches the result."""
    return mantissa.isfinite() & (mantissa > 0) & (exponent >= LOWEST / math.log(2) + 2048) & (exponent <= 2.0**21)


def _by_maximum(x: Tensor) -> Tensor:
    e = (x - x.amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True)
