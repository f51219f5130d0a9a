"""Hadamard products in place, in torch: what the C++ kernel must agree with."""

from __future__ import annotations

import torch
from torch import Tensor


def fwht_reference(x: Tensor, signs: Tensor | None, inner: int, scale: float) -> Tensor:
    """Arguments as `dither.kernels.fwht_rows`."""
    x *= scale
    segment = x.shape[1]
    if signs is not None:
        segment //= signs.shape[0]
        x.copy_(torch.matmul(signs.mT, x.view(-1, signs.shape[0], segment)).view(x.shape))
    distance = inner
    while distance < segment:
        a, b = x.view(-1, 2, distance).unbind(1)
        difference = a - b
        a += b
        b.copy_(difference)
        distance *= 2
    return x
