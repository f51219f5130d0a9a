"""Packed codes to values in torch: what the C++ kernel must agree with, bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

from dither.kernels.packing_reference import unpack_rows_reference


def dequantize_affine_reference(
    packed: Tensor, bits: int, scale: Tensor, zero: Tensor, group: int, columns: int, dtype: torch.dtype, values: Tensor | None = None
) -> Tensor:
    """Arguments as `dither.kernels.dequantize_affine`, ``scale`` and ``zero`` float32."""
    codes = unpack_rows_reference(packed, bits, columns)
    index = torch.arange(columns, device=packed.device) // group
    meant = codes.float() if values is None else values[codes.long()]
    return (scale[:, index] * (meant - zero[:, index])).to(dtype)
