"""Products with packed weights in torch: what the C++ kernel must agree with, up to the order of its sums."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from dither.kernels.dequantize import dequantize_affine


def packed_matmul_reference(x: Tensor, packed: Tensor, bits: int, scale: Tensor, zero: Tensor | float, group: int) -> Tensor:
    """Arguments as `dither.kernels.packed_matmul`: the weights decoded to float32, then multiplied."""
    zeros = zero if isinstance(zero, Tensor) else scale.new_full(scale.shape, zero, dtype=scale.dtype)
    weight = dequantize_affine(packed, bits, scale, zeros, group, x.shape[1])
    return F.linear(x.float(), weight).to(x.dtype)
