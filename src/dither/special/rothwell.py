"""Rothwell's integral for log K_v(x), the paper's expression for small arguments and orders: for comparison, `log_kv` does better.

    K_v(x) = sqrt(pi) / (Gamma(v + 1/2) (2 x)^v) e^-x int_0^1 g(u) + h(u) du,      n = 8,  b = 2 n / (2 v + 1)
    log g = log b - u^b + (v - 1/2) log(2 x + u^b) + (n - 1) log u
    log h = -1/u - (2 v + 1) log u + (v - 1/2) log(2 x u + 1)

summed by Simpson's rule with 600 intervals in the domain of logarithms. Source: Rothwell 2005, as in Plesner, Sorensen and Hauberg, arXiv 2409.08729.
Two exponentials and four logarithms a node, 1,200 in all; below v = 1/2 the integrand is not smooth and 600 intervals are good for nine digits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

INTERVALS, POWER = 600, 8
CHUNK = 4096


def rothwell(v: Tensor, x: Tensor) -> Tensor:
    """log K_v(x) for ``v, x [N]`` float64, finite and positive; meant for x <= 30 and v <= 13."""
    return torch.cat([_chunk(p[:, None], q[:, None]) for p, q in zip(torch.split(v, CHUNK), torch.split(x, CHUNK), strict=True)])


def _chunk(v: Tensor, x: Tensor) -> Tensor:
    j = torch.arange(1, INTERVALS + 1, dtype=v.dtype, device=v.device)  # both integrands vanish at 0
    u = j / INTERVALS
    weight = 2 + 2 * (j % 2)
    weight[-1] = 1
    b = 2 * POWER / (2 * v + 1)
    power = u**b  # [C, N]
    log_u = torch.log(u)
    g = torch.log(b) - power + (v - 0.5) * torch.log(2 * x + power) + (POWER - 1) * log_u
    h = -1 / u - (2 * v + 1) * log_u + (v - 0.5) * torch.log1p(2 * x * u)
    terms = torch.cat([g, h], 1) + torch.log(torch.cat([weight, weight]) / (3 * INTERVALS))
    v, x = v[:, 0], x[:, 0]
    return 0.5 * math.log(math.pi) - torch.lgamma(v + 0.5) - v * torch.log(2 * x) - x + torch.logsumexp(terms, 1)
