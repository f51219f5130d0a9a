"""Products with packed weights in torch: what the C++ kernel must agree with, up to the order of its sums."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dither.kernels.dequantize import dequantize_affine


def packed_matmul_reference(
    x: Tensor, packed: Tensor, bits: int, scale: Tensor, zero: Tensor | float, group: int, values: Tensor | None = None, tensor_scale: float = 1.0
) -> Tensor:
    """Arguments as `dither.kernels.packed_matmul`: the weights decoded to float32, then multiplied."""
    whole = scale.float() * tensor_scale
    zeros = zero if isinstance(zero, Tensor) else torch.full_like(whole, zero)
    weight = dequantize_affine(packed, bits, whole, zeros, group, x.shape[1], values=values)
    return F.linear(x.float(), weight).to(x.dtype)
