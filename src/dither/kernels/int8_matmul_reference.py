"""Products of rounded rows with packed weights in torch, summed in float64: what the C++ kernel must agree with, up to its sums over groups."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dither.kernels.packing import unpack_rows

if TYPE_CHECKING:
    from dither.kernels.int8_matmul import TokenGrid

# what a scale is kept within, so that it is neither zero nor infinite as stored
LIMITS = {torch.float16: (2.0**-24, 65504.0), torch.bfloat16: (2.0**-126, 3.3895313892515355e38), torch.float32: (2.0**-126, 3.4028234663852886e38)}


def _stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``scale`` float32, rounded to what ``dtype`` holds."""
    smallest, largest = LIMITS[dtype]
    size = scale.abs().clamp(smallest, largest).to(dtype).float().clamp(min=smallest)
    return torch.where(scale < 0, -size, size)


def round_tokens(x: Tensor, grid: TokenGrid) -> tuple[Tensor, Tensor]:
    """``x [T, I]`` float32 -> the integers q - z ``[T, I]`` and the scales ``[T, 1]``, both float32; NaN scales for rows with NaN or inf."""
    finite = torch.isfinite(x).all(1, keepdim=True)
    x = torch.where(finite, x, 0.0)
    lo, hi = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
    if grid.sym is False:
        code_max = (1 << grid.bits) - 1
        scale = _stored((hi - lo) / code_max, grid.scale)
        point = (-lo / scale).round().clamp(0, code_max)
        q = ((x / scale).round() + point).clamp(0, code_max) - point
    else:
        peak = torch.maximum(-lo, hi)
        if grid.sym == "extremum":
            peak = torch.where(hi >= -lo, -hi, -lo)
        scale = _stored(peak / grid.divisor, grid.scale)
        q = (x / scale).round().clamp(grid.lowest, grid.middle - 1)
    return q, torch.where(finite, scale, float("nan"))


def int8_matmul_reference(
    x: Tensor, packed: Tensor, bits: int, scale: Tensor, zero: Tensor | int, group: int, grid: TokenGrid
) -> Tensor:
    """Arguments as `dither.kernels.int8_matmul`; rows with NaN or inf become NaN."""
    columns = x.shape[1]
    if not columns:
        return x.new_zeros(x.shape[0], packed.shape[0])
    q, steps = round_tokens(x.float(), grid)
    index = torch.arange(columns, device=x.device) // group
    zeros = zero.double()[:, index] if isinstance(zero, Tensor) else float(zero)
    weight = (unpack_rows(packed, bits, columns).double() - zeros) * scale.double()[:, index]
    return ((q.double() @ weight.T) * steps.double()).to(x.dtype)
