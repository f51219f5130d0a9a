"""Bit streams of codes of 1 .. 24 bits, least significant bit first: code ``k`` of a row at bits ``[k b, (k + 1) b)``, rows padded with
zero bits to a multiple of four bytes. The order of `kernels.packing`, whose codes fit a byte.

A code and the bits before it in its 32-bit word fit 55 bits, so each code is shifted once and falls into at most two words.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dither.kernels.checks import check, check_range
from dither.kernels.packing import packed_stride

WIDEST = 24
_WORD = 0xFFFFFFFF


def pack_wide(codes: Tensor, bits: int) -> Tensor:
    """``codes [R, N]`` int32, each below ``2**bits``, to ``[R, stride]`` uint8. ValueError for anything else."""
    _check_bits(bits)
    check("codes", codes, (None, None), (torch.int32,))
    check_range("codes", codes, 0, 2**bits - 1)
    rows, count = codes.shape
    first, shift = _places(count, bits, codes.device)
    shifted = codes.long() << shift
    words = torch.zeros(rows, packed_stride(count, bits) // 4 + 1, dtype=torch.int64, device=codes.device)
    words.index_add_(1, first, shifted & _WORD).index_add_(1, first + 1, shifted >> 32)  # codes share no bit: a sum is an or
    words = words[:, :-1]
    return torch.where(words > 0x7FFFFFFF, words - (1 << 32), words).to(torch.int32).contiguous().view(torch.uint8)


def unpack_wide(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse: ``[R, stride]`` uint8 to ``[R, count]`` int32."""
    _check_bits(bits)
    check("packed", packed, (None, packed_stride(count, bits)), (torch.uint8,))
    if not packed.shape[1]:
        return torch.zeros(packed.shape[0], count, dtype=torch.int32, device=packed.device)
    if packed.storage_offset() % 4:  # words cannot be seen there
        packed = packed.clone()
    words = _padded(packed.view(torch.int32).long() & _WORD)
    first, shift = _places(count, bits, packed.device)
    pair = words[:, first] | (words[:, first + 1] << 32)
    return ((pair >> shift) & ((1 << bits) - 1)).to(torch.int32)


def _padded(words: Tensor) -> Tensor:
    """One more word of zeros a row."""
    return torch.cat([words, words.new_zeros(words.shape[0], 1)], 1)


def _places(count: int, bits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """``[N]``: the word that holds each code's first bit, and the bits before it there."""
    start = torch.arange(count, device=device) * bits
    return start // 32, start % 32


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= WIDEST:
        raise ValueError(f"bits: must be 1 .. {WIDEST}, not {bits}")
