"""Products with Kronecker products of sign matrices in torch: what the C++ kernel must agree with."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def hadamard_rows_reference(x: Tensor, dense: Sequence[Tensor], power: int) -> Tensor:
    """Arguments as `dither.kernels.hadamard_rows`."""
    rows, n = x.shape
    y = x.float() * (1 / math.sqrt(n))
    inner = n
    for signs in dense:
        inner //= signs.shape[0]
        y = torch.matmul(signs.mT, y.reshape(-1, signs.shape[0], inner))
    distance = 1
    while distance < power:
        a, b = y.reshape(-1, 2, distance).unbind(1)
        y = torch.stack((a + b, a - b), 1)
        distance *= 2
    return y.reshape(rows, n).to(x.dtype)
