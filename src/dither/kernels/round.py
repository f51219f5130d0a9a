"""Weights rounded to the min-max grids of their groups: fit, encode and decode of an asymmetric integer format in one
pass.

    lo = min(w, 0),  hi = max(w, 0),  s = (hi - lo) / N as stored,  z = clip(rne(-lo / s), 0, N),  N = 2^bits - 1
    value = s (clip(rne(w / s) + z, 0, N) - z)

Reads and writes 4 bytes a weight, where the same in torch goes over the matrix nine times. `round_to_one_grid` is the same for one grid that is
given: few-bit inputs with static ranges.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dither.kernels.checks import check, check_bits, check_finite
from dither.kernels.extension import extension, isa, threads
from dither.kernels.round_reference import round_affine_reference, round_to_one_grid_reference

LARGEST_ZERO = 2**21  # up to which the kernel's sums are exact
SCALE_TYPES = (torch.float16, torch.bfloat16, torch.float32)  # in the order of csrc/round.hpp


def round_affine(weight: Tensor, bits: int, group: int, scale: torch.dtype = torch.float16) -> Tensor:
    """``weight [O, I]`` float32 as ``bits``-wide codes over groups of ``group`` inputs would store it, float32.

    The last group of a row may be shorter. ``scale``: the storage type of scales, float16, bfloat16 or float32. Raises
    ValueError for other shapes, dtypes, widths and strides, and for NaN and inf.
    """
    check_bits(bits)
    if group < 1:
        raise ValueError(f"group: must be at least 1, not {group}")
    if scale not in SCALE_TYPES:
        raise ValueError(f"scale: must be torch.float16, torch.bfloat16 or torch.float32, not {scale}")
    check("weight", weight, (None, None), (torch.float32,))
    weight = weight.detach()
    group = min(group, max(weight.shape[1], 1))
    native = extension() if weight.device.type == "cpu" else None
    if native is None:
        check_finite("weight", weight)
        return round_affine_reference(weight, bits, group, scale)
    values = torch.empty_like(weight)
    finite = native.round_affine(weight, 2**bits - 1, group, SCALE_TYPES.index(scale), values, isa(), threads())
    if not finite:
        check_finite("weight", weight)
    return values


def round_to_one_grid(x: Tensor, bits: int, scale: float, zero: float) -> Tensor:
    """``x [R, I]`` float32 -> ``s (clip(rne(x / s) + z, 0, N) - z)``, float32; NaN stays NaN. ``zero``: a whole number of any size.

    Raises ValueError for other shapes, dtypes, widths and strides, a scale that is not finite and positive, a zero that is not whole.
    """
    check_bits(bits)
    check("x", x, (None, None), (torch.float32,))
    if not (0 < scale < float("inf")):
        raise ValueError(f"scale: must be finite and positive, not {scale}")
    if zero != round(zero):
        raise ValueError(f"zero: must be a whole number, not {zero}")
    x, code_max = x.detach(), 2**bits - 1
    native = extension() if x.device.type == "cpu" and abs(zero) < LARGEST_ZERO else None
    if native is not None:
        values = torch.empty_like(x)
        if native.round_to_one_grid(x, scale, -zero, code_max - zero, values, isa(), threads()):
            return values
    return round_to_one_grid_reference(x, bits, scale, zero)
