"""Matrices that are two levels at most places and a few wider codes at the others: from their stored form to values.

    value[o, i] = high[o, g] where plane else low[o, g]            where mask, g = i // group
                  scale[o] (code - zero[o])                        at the other, *salient* places

The plane has one bit a weight: the level, and at salient places the code's highest bit. What else a salient code has lies in
one LSB-first stream of ``bits - 1`` bits a code, row by row in column order.

A mask with few salient places is shorter as the list of them, in Elias-Fano coding (Elias, JACM 1974): of the ascending places ``p_k < n``
the lowest ``l`` bits as they are, and ``p_k >> l`` as set bits at positions ``(p_k >> l) + k``: ``m l + m + (n - 1 >> l)`` bits for m places,
whatever they are, and at most about half a bit a place above the least possible.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dither.kernels.checks import check, check_bits
from dither.kernels.extension import extension, isa, threads
from dither.kernels.packing import packed_stride
from dither.kernels.partial_reference import dequantize_partial_reference, places_to_bitmap_reference

_PARAMETERS = (torch.float32, torch.float16, torch.bfloat16)


def dequantize_partial(
    mask: Tensor | None, plane: Tensor, low: Tensor, high: Tensor, codes: Tensor | None, bits: int, offsets: Tensor | None,
    scale: Tensor, zero: Tensor, group: int, columns: int, dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Values ``[O, columns]`` of ``dtype`` float32 or bfloat16.

    ``mask``, ``plane``: bitmaps ``[O, stride]`` uint8 (see `dither.kernels.packing`); a mask of None means no salient place
    where ``codes`` is None too, else that all are. ``low``, ``high``: ``[O, ceil(columns / group)]``; ``codes [n]`` uint8: the
    stream; ``bits``: 2 .. 8, of a salient code; ``offsets [O]`` uint32: salient places before each row, where there is a mask;
    ``scale``, ``zero``: ``[O]``. Arithmetic is in float32; bfloat16 is rounded once, at the end. Codes that a wrong mask or
    offset would take from beyond the stream read as zero. Raises ValueError for other shapes, dtypes, widths and strides.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype: must be torch.float32 or torch.bfloat16, not {dtype}")
    check_parts(mask, plane, low, high, codes, bits, offsets, scale, zero, group, columns)
    rows = plane.shape[0]
    low, high, scale, zero = (x.detach().float() for x in (low, high, scale, zero))
    native = extension() if plane.device.type == "cpu" else None
    if native is None:
        return dequantize_partial_reference(mask, plane, low, high, codes, bits, scale, zero, group, columns, dtype)
    values = torch.empty(rows, columns, dtype=dtype)
    out = values.view(torch.int16) if dtype == torch.bfloat16 else values
    native.partial(mask, plane, low, high, codes, bits - 1, offsets, scale, zero, group, out, isa(), threads())
    return values


def check_parts(
    mask: Tensor | None, plane: Tensor, low: Tensor, high: Tensor, codes: Tensor | None, bits: int, offsets: Tensor | None,
    scale: Tensor, zero: Tensor, group: int, columns: int,
) -> None:
    """Raises ValueError unless the parts of a stored matrix, as `dequantize_partial` takes them, fit one another."""
    check_bits(bits)
    if bits < 2:
        raise ValueError(f"bits: must be 2 .. 8, not {bits}")
    if group < 1:
        raise ValueError(f"group: must be at least 1, not {group}")
    check("plane", plane, (None, packed_stride(columns, 1)), (torch.uint8,))
    rows = plane.shape[0]
    if mask is not None:
        check("mask", mask, tuple(plane.shape), (torch.uint8,))
        if codes is None or offsets is None:
            raise ValueError("codes: a mask needs codes and offsets")
    shape = (rows, -(-columns // group))
    check("low", low, shape, _PARAMETERS)
    check("high", high, shape, _PARAMETERS)
    if codes is not None:
        check("codes", codes, (None,), (torch.uint8,))
    if offsets is not None:
        check("offsets", offsets, (rows,), (torch.uint32,))
    check("scale", scale, (rows,), _PARAMETERS)
    check("zero", zero, (rows,), (*_PARAMETERS, torch.uint8))


def places_to_bitmap(
    low: Tensor, low_bits: int, high: Tensor, count: int, rows: int, columns: int, listed: bool
) -> Tensor:
    """The bitmap ``[rows, stride]`` uint8 whose bits are ``listed`` at ``count`` listed places (row by row) and the opposite elsewhere.

    ``low``: a stream of ``low_bits`` (0 .. 8) bits a place; ``high``: the bits that say the rest, see above. Padding is zero. A damaged list
    gives a wrong bitmap, never a wrong access. Raises ValueError for other shapes, dtypes and widths.
    """
    if not 0 <= low_bits <= 8:
        raise ValueError(f"low_bits: must be 0 .. 8, not {low_bits}")
    check("low", low, (-(-count * low_bits // 8),), (torch.uint8,))
    check("high", high, (None,), (torch.uint8,))
    stride = packed_stride(columns, 1)
    native = extension() if high.device.type == "cpu" else None
    if native is None:
        return places_to_bitmap_reference(low, low_bits, high, count, rows, columns, listed, stride)
    bitmap = torch.empty(rows, stride, dtype=torch.uint8)
    native.places(low, low_bits, high, count, columns, listed, bitmap)
    return bitmap
