"""Packed codes to values, group by group: what a layer with packed weights does before it multiplies.

    value[o, i] = scale[o, i // group] (code[o, i] - zero[o, i // group])

A code is its own value, or names one of a table of ``2^bits``.

One pass: reads ``bits / 8`` bytes and writes 4 (float32) or 2 (bfloat16) a weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dither.kernels.checks import check, check_bits
from dither.kernels.dequantize_reference import dequantize_affine_reference
from dither.kernels.extension import extension, isa, threads
from dither.kernels.packing import packed_stride

_PARAMETERS = (torch.float32, torch.float16, torch.bfloat16)


def dequantize_affine(
    packed: Tensor, bits: int, scale: Tensor, zero: Tensor, group: int, columns: int, dtype: torch.dtype = torch.float32,
    values: Tensor | None = None,
) -> Tensor:
    """``packed [O, stride]`` uint8 (see `dither.kernels.packing`) to values ``[O, columns]`` of ``dtype`` float32 or
    bfloat16.

    ``scale`` and ``zero``: ``[O, ceil(columns / group)]``; scale float32, float16 or bfloat16, zero one of these or
    uint8; ``values [2^bits]`` float32: what codes mean (None: themselves). Arithmetic is in float32; bfloat16 is rounded
    once, at the end. Raises ValueError for other shapes, dtypes, widths and strides.
    """
    check_bits(bits)
    if group < 1:
        raise ValueError(f"group: must be at least 1, not {group}")
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype: must be torch.float32 or torch.bfloat16, not {dtype}")
    check("packed", packed, (None, packed_stride(columns, bits)), (torch.uint8,))
    shape = (packed.shape[0], -(-columns // group))
    check("scale", scale, shape, _PARAMETERS)
    check("zero", zero, shape, (*_PARAMETERS, torch.uint8))
    if values is not None:
        check("values", values, (1 << bits,), (torch.float32,))
    scale, zero = scale.detach().float(), zero.detach().float()
    native = extension() if packed.device.type == "cpu" else None
    if native is None:
        return dequantize_affine_reference(packed, bits, scale, zero, group, columns, dtype, values)
    found = torch.empty(packed.shape[0], columns, dtype=dtype)
    out = found.view(torch.int16) if dtype == torch.bfloat16 else found
    native.dequantize(packed, bits, scale, zero, group, values, out, isa(), threads())
    return found
