"""Bit streams in torch: what the C++ kernel must agree with."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_rows_reference(codes: Tensor, bits: int, stride: int) -> Tensor:
    """``codes [R, I]`` uint8 to ``[R, stride]`` uint8."""
    rows, columns = codes.shape
    shifts = torch.arange(bits, dtype=torch.uint8, device=codes.device)
    stream = torch.zeros(rows, stride * 8, dtype=torch.uint8, device=codes.device)
    stream[:, : columns * bits] = (codes[:, :, None] >> shifts & 1).reshape(rows, columns * bits)  # (R, I b)
    places = 2 ** torch.arange(8, device=codes.device)
    return (stream.view(rows, stride, 8) * places).sum(2).to(torch.uint8)


def unpack_rows_reference(packed: Tensor, bits: int, columns: int) -> Tensor:
    """``packed [R, stride]`` uint8 to ``[R, columns]`` uint8."""
    rows = packed.shape[0]
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    stream = (packed[:, :, None] >> shifts & 1).flatten(1)[:, : columns * bits]  # (R, I b), one bit a byte
    places = 2 ** torch.arange(bits, device=packed.device)
    return (stream.reshape(rows, columns, bits) * places).sum(2).to(torch.uint8)
