"""Rows times a Hadamard matrix in place, for rows of any length that memory holds.

    y = scale x (D x W x I_inner),     n = d power,     W the Walsh-Hadamard matrix of order ``power``

n (d + log2 power) additions a row. A row that fits the second cache is read and written once, one of 2^26 floats twice: memory bounds the time
of long rows, by 4 bytes-of-the-row / bandwidth. Levels run in one order on every instruction set, so scalar, AVX2 and AVX-512 give the same bits,
and those of `hadamard_rows` where that takes the same factors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dither.kernels.checks import check
from dither.kernels.extension import extension, isa, threads
from dither.kernels.fwht_reference import fwht_reference

LARGEST = 1024  # of D


def fwht_rows(x: Tensor, signs: Tensor | None = None, *, inner: int = 1, scale: float = 1.0) -> Tensor:
    """``x [R, n inner]`` float32 or float64, contiguous, overwritten by its product and returned. ``signs``: D ``[d, d]`` of +-1 in x's dtype, a row
    for each input; n = d power. ``inner`` is 2 where real and imaginary parts alternate, else 1.

    Raises ValueError for other shapes, dtypes and strides, and for n that is not d times a power of two. NaN and inf spread over their row.
    """
    check("x", x, (None, None), (torch.float32, torch.float64))
    if inner not in (1, 2):
        raise ValueError(f"inner: must be 1 or 2, not {inner}")
    d = 1
    if signs is not None:
        check("signs", signs, (None, signs.shape[-1] if signs.dim() else None), (x.dtype,))
        d = signs.shape[0]
        if d != signs.shape[1] or not 1 <= d <= LARGEST:
            raise ValueError(f"signs: shape {list(signs.shape)}, must be square, of order 1 to {LARGEST}")
    power, rest = divmod(x.shape[1], d * inner)
    if rest or power < 1 or power & (power - 1):
        raise ValueError(f"x: shape {list(x.shape)}, must be [any, {d * inner} times a power of two]")
    x = x.detach()
    native = extension() if x.device.type == "cpu" else None
    if native is None:
        return fwht_reference(x, signs, inner, scale)
    native.fwht(x, signs, power, inner, scale, isa(), threads())
    return x
