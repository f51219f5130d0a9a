"""Matrices of two levels and a few wider codes in torch: what the C++ kernels must agree with, bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

from dither.kernels.packing_reference import pack_rows_reference, unpack_rows_reference


def dequantize_partial_reference(
    mask: Tensor | None, plane: Tensor, low: Tensor, high: Tensor, codes: Tensor | None, bits: int, scale: Tensor,
    zero: Tensor, group: int, columns: int, dtype: torch.dtype,
) -> Tensor:
    """Arguments as `dither.kernels.dequantize_partial`; row offsets are not needed, since rows follow each other."""
    rows = plane.shape[0]
    top = unpack_rows_reference(plane, 1, columns)  # (O, I)
    index = torch.arange(columns, device=plane.device) // group
    values = torch.where(top.bool(), high[:, index], low[:, index])
    if codes is None:
        return values.to(dtype)
    salient = torch.ones(rows, columns, dtype=torch.bool, device=plane.device)
    if mask is not None:
        salient = ~unpack_rows_reference(mask, 1, columns).bool()
    count = int(salient.sum())
    whole = torch.zeros(rows, columns, dtype=torch.int64, device=plane.device)
    whole[salient] = unpack_rows_reference(codes[None], bits - 1, count)[0].long()
    whole += top.long() << (bits - 1)
    wide = scale[:, None] * (whole.float() - zero[:, None])
    return torch.where(salient, wide, values).to(dtype)


def places_to_bitmap_reference(
    low: Tensor, low_bits: int, high: Tensor, count: int, rows: int, columns: int, listed: bool, stride: int
) -> Tensor:
    """Arguments as `dither.kernels.places_to_bitmap`."""
    set_bits = unpack_rows_reference(high[None], 1, 8 * high.numel())[0].nonzero()[:count, 0]
    places = set_bits - torch.arange(len(set_bits), device=high.device)
    if low_bits:
        places = (places << low_bits) + unpack_rows_reference(low[None], low_bits, count)[0, : len(places)].long()
    flat = torch.full((rows * columns,), not listed, dtype=torch.bool, device=high.device)
    flat[places[places < rows * columns]] = listed
    return pack_rows_reference(flat.view(rows, columns).to(torch.uint8), 1, stride)
