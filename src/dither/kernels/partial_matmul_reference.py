"""Products with matrices of two levels and a few wider codes in torch: what the C++ kernel must agree with, up to the order of its sums."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dither.kernels.partial_reference import dequantize_partial_reference


def partial_matmul_reference(
    x: Tensor, mask: Tensor | None, plane: Tensor, low: Tensor, high: Tensor, codes: Tensor | None, bits: int, scale: Tensor, zero: Tensor, group: int
) -> Tensor:
    """``x [T, I] -> [T, O]``; the other arguments as in `dither.kernels.dequantize_partial`: the weights decoded to float32, then multiplied."""
    weight = dequantize_partial_reference(mask, plane, low, high, codes, bits, scale, zero, group, x.shape[1], torch.float32)
    return F.linear(x.float(), weight).to(x.dtype)
