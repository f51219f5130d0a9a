"""Bit streams: codes of 1 .. 8 bits, least significant bit first, row by row.

Code ``k`` of a row occupies bits ``[k b, (k + 1) b)`` of the row's bytes (codes of 3, 5, 6 and 7 bits straddle bytes).
Every row is padded with zero bits to a multiple of four bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dither.kernels.checks import check, check_bits, check_range
from dither.kernels.extension import extension, threads
from dither.kernels.packing_reference import pack_rows_reference, unpack_rows_reference

_ALONE = 1 << 16  # codes that one thread unpacks before another could be woken


def packed_stride(columns: int, bits: int) -> int:
    """Bytes of one packed row."""
    return (columns * bits + 31) // 32 * 4


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """``codes [R, I]`` uint8, each below ``2**bits``, to ``[R, stride]`` uint8. Raises ValueError for anything else."""
    check_bits(bits)
    check("codes", codes, (None, None), (torch.uint8,))
    check_range("codes", codes, 0, 2**bits - 1)
    native = extension() if codes.device.type == "cpu" else None
    if native is None:
        return pack_rows_reference(codes, bits, packed_stride(codes.shape[1], bits))
    packed = torch.empty(codes.shape[0], packed_stride(codes.shape[1], bits), dtype=torch.uint8)
    native.pack_rows(codes, bits, packed, threads())
    return packed


def unpack_rows(packed: Tensor, bits: int, columns: int) -> Tensor:
    """``packed [R, stride]`` uint8 to codes ``[R, columns]`` uint8. Raises ValueError where the stride is not that of
    ``columns``.
    """
    check_bits(bits)
    check("packed", packed, (None, packed_stride(columns, bits)), (torch.uint8,))
    native = extension() if packed.device.type == "cpu" else None
    if native is None:
        return unpack_rows_reference(packed, bits, columns)
    codes = torch.empty(packed.shape[0], columns, dtype=torch.uint8)
    native.unpack_rows(packed, bits, codes, threads() if codes.numel() > _ALONE else 1)
    return codes
