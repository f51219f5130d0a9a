"""Weights rounded to min-max grids in torch: what the C++ kernel must agree with, bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

# smallest and largest scale that is stored: below, it would be 0
LIMITS = {
    torch.float16: (2.0**-24, 65504.0),
    torch.bfloat16: (2.0**-126, 3.3895313892515355e38),
    torch.float32: (2.0**-126, 3.4028234663852886e38),
}


def round_affine_reference(weight: Tensor, bits: int, group: int, scale: torch.dtype) -> Tensor:
    """Arguments as `dither.kernels.round_affine`, ``group`` at most I."""
    code_max = 2**bits - 1
    rows, columns = weight.shape
    values = torch.empty_like(weight)
    full = columns - columns % group
    for first, last, size in ((0, full, group), (full, columns, columns - full)):
        if first == last or rows == 0:
            continue
        x = weight[:, first:last].reshape(rows, -1, size)  # (O, G, g)
        lo, hi = x.amin(2, keepdim=True).clamp(max=0), x.amax(2, keepdim=True).clamp(min=0)
        s = ((hi - lo) / code_max).clamp(*LIMITS[scale]).to(scale).float()  # (O, G, 1)
        zero = (-lo / s).round().clamp(0, code_max)
        codes = (x / s).round_().add_(zero).clamp_(0, code_max)
        values[:, first:last] = (codes.sub_(zero).mul_(s)).reshape(rows, -1)
    return values


def round_to_one_grid_reference(x: Tensor, bits: int, scale: float, zero: float) -> Tensor:
    """Arguments as `dither.kernels.round_to_one_grid`."""
    s, z = (torch.tensor(v, dtype=torch.float32, device=x.device) for v in (scale, zero))
    return (x / s).round_().add_(z).clamp_(0, 2**bits - 1).sub_(z).mul_(s)
