"""Products of rounded rows in torch, with float64 sums: what `w8a8` and `fp8` must agree with, and what their operations are on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from dither.kernels.gpu.rounded import SCALES, scale_type


def _scales(x: Tensor, limit: float, input_scale: str, *, zeros_have_one: bool) -> Tensor:
    """``[T, 1]`` float32: max|x| / limit of each row, rounded to ``input_scale``; NaN for rows that hold NaN or inf."""
    stored = scale_type(input_scale)
    smallest, largest = SCALES[stored]
    peak = x.abs().amax(1, keepdim=True)
    scale = peak / limit
    if zeros_have_one:
        scale = torch.where(peak == 0, 1.0, scale)
    kept = scale.clamp(smallest, largest).to(stored).float().clamp(min=smallest)
    return torch.where(torch.isfinite(peak), kept, float("nan"))


def int8_matmul_reference(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, input_scale: str) -> Tensor:
    """Arguments as `w8a8.int8_matmul`."""
    wide = x.float()
    s = _scales(wide, 127.0, input_scale, zeros_have_one=False)
    q = (wide / s).round().clamp(-127, 127).double()
    codes = packed[:, : x.shape[1]].double() - (128.0 if zero is None else zero.double()[:, None])
    return ((q @ codes.T) * s.double() * scale.double().T).to(x.dtype)


def float8_matmul_reference(x: Tensor, packed: Tensor, scale: Tensor, input_scale: str) -> Tensor:
    """Arguments as `fp8.float8_matmul`."""
    wide = x.float()
    s = _scales(wide, 448.0, input_scale, zeros_have_one=True)
    q = (wide / s).clamp(-448, 448).to(torch.float8_e4m3fn).double()
    weight = packed[:, : x.shape[1]].contiguous().view(torch.float8_e4m3fn).double()
    return ((q @ weight.T) * s.double() * scale.double().T).to(x.dtype)
