"""Products with packed weights in torch: what the C++ kernel must agree with, up to the order of its sums."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dither.kernels.dequantize import dequantize_affine
from dither.kernels.packing import unpack_rows


def packed_matmul_reference(
    x: Tensor, packed: Tensor, bits: int, scale: Tensor, zero: Tensor | float, group: int, values: Tensor | None = None, tensor_scale: float = 1.0
) -> Tensor:
    """Arguments as `dither.kernels.packed_matmul`: the weights decoded to float32, then multiplied."""
    columns = x.shape[1]
    s = scale.float() * tensor_scale
    zeros = zero.float() if isinstance(zero, Tensor) else torch.full_like(s, zero)
    if values is None:
        weight = dequantize_affine(packed, bits, s, zeros, group, columns)
    else:
        index = torch.arange(columns, device=x.device) // group
        weight = s[:, index] * (values[unpack_rows(packed, bits, columns).long()] - zeros[:, index])
    return F.linear(x.float(), weight).to(x.dtype)
