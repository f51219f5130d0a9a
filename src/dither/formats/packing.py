"""Codes as bits: code k of a row at bits k b .. k b + b - 1 of the row's stream, least significant bit first, bytes rising.

3, 5, 6 and 7 bit codes straddle bytes. A row's stream is padded to 4 bytes, so that rows are whole 32-bit words; a stream (zero points) is padded
to one byte at its end. The same order as compressed-tensors' int32 words and GPTQ's, read little-endian.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dither import kernels


def row_stride(count: int, bits: int) -> int:
    """Bytes of a packed row of ``count`` codes."""
    return -(-count * bits // 32) * 4


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """``codes [R, I]`` uint8, each below 2^bits -> ``[R, stride]`` uint8. Raises ValueError for codes that do not fit."""
    _check(codes, bits)
    return kernels.pack_rows(codes.contiguous(), bits)


def unpack_rows(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse: ``[R, stride]`` -> ``[R, count]`` uint8."""
    if packed.dtype != torch.uint8 or packed.dim() != 2 or packed.shape[1] != row_stride(count, bits):
        raise ValueError(
            f"packed rows of {count} codes at {bits} bits are [R, {row_stride(count, bits)}] uint8, not {tuple(packed.shape)}"
        )
    return kernels.unpack_rows(packed.contiguous(), bits, count)


def pack_stream(codes: Tensor, bits: int) -> Tensor:
    """``codes [N]`` uint8 -> ``[ceil(N bits / 8)]`` uint8."""
    _check(codes, bits)
    return kernels.pack_rows(codes.reshape(1, -1).contiguous(), bits)[0, : -(-codes.numel() * bits // 8)].contiguous()


def unpack_stream(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse: ``[ceil(N bits / 8)]`` -> ``[count]`` uint8."""
    if packed.numel() != -(-count * bits // 8):
        raise ValueError(
            f"a stream of {count} codes at {bits} bits has {-(-count * bits // 8)} bytes, not {packed.numel()}"
        )
    padded = torch.zeros(1, row_stride(count, bits), dtype=torch.uint8, device=packed.device)
    padded[0, : packed.numel()] = packed
    return kernels.unpack_rows(padded, bits, count)[0]


def _check(codes: Tensor, bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be 1 to 8, not {bits}")
    if codes.dtype != torch.uint8:
        raise ValueError(f"codes must be uint8, not {codes.dtype}")
    if bits < 8 and codes.numel() and int(codes.max()) >= 1 << bits:
        raise ValueError(f"code {int(codes.max())} does not fit {bits} bits")
