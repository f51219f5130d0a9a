"""The Walsh-Hadamard transform of long vectors, along the last axis, and its relatives of orders 12 2^k and 20 2^k.

    y_k = sum_m x_m (-1)^popcount(m & k),   k, m = 0 .. N - 1,   N = 2^n         (natural or Hadamard order; W W = N I)

`fwht` makes y, `fwht_` overwrites x. ``normalize`` divides by sqrt(N), so that the transform is orthogonal and its own inverse. ``order`` d puts a
matrix D of Paley's in front (`special.paley`: 12 and 20 are those that rotations of language models need): y = x (D x W), N = d 2^k; D of orders
12, 20 and 24 is not symmetric, and ``transpose`` gives y = x (D x W)^T, which undoes it. Rows are vectors, as in `special.hadamard`; this module
is for rows longer than a cache, float64, complex numbers and transforms in place, that one for rows of models.

Cost: N (d + log2 N) additions. Memory: none beside y. Source: Fino and Algazi, Unified matrix treatment of the fast Walsh-Hadamard transform,
1976; passes over memory as in Frigo et al., Cache-oblivious algorithms, 1999.
"""

from __future__ import annotations

import functools
import math
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dither.kernels import fwht_rows
from dither.special.paley import paley, paley_order

Array = TypeVar("Array", Tensor, "np.ndarray[Any, Any]")
TENSORS = (torch.float32, torch.float64, torch.complex64, torch.complex128)
ARRAYS = tuple(np.dtype(name) for name in ("float32", "float64", "complex64", "complex128"))


def fwht(x: Array, normalize: bool = False, *, order: int = 1, transpose: bool = False) -> Array:
    """The transform of ``x [..., N]`` along its last axis: a new tensor, or array where x is one; the same shape and dtype.

    float32, float64, complex64 or complex128; real and imaginary parts are transformed alike. Tensors on any device, with gradients. Domain: all
    finite numbers whose sum of N does not overflow; the error is at most log2(N) roundings of the sum of |x|. NaN and inf spread over their row.

    Raises ValueError where x has another dtype or no axis, N is not ``order`` times a power of two (1 counts as one), or Paley gives no matrix of
    that order.
    """
    if isinstance(x, np.ndarray):
        return fwht_(np.array(x, order="C"), normalize, order=order, transpose=transpose)
    _check(x, order)
    if x.requires_grad:
        made: Tensor = _Transform.apply(x, normalize, order, transpose)  # type: ignore[no-untyped-call]
        return made
    return fwht_(x.resolve_conj().clone(memory_format=torch.contiguous_format), normalize, order=order, transpose=transpose)


def fwht_(x: Array, normalize: bool = False, *, order: int = 1, transpose: bool = False) -> Array:
    """`fwht` that overwrites ``x``, which must be contiguous, and returns it. No gradients.

    Raises ValueError as `fwht` does, and where x is not contiguous or wants gradients.
    """
    if isinstance(x, np.ndarray):
        if x.dtype not in ARRAYS:
            raise ValueError(f"x: dtype {x.dtype}, must be float32, float64, complex64 or complex128")
        if not (x.flags.c_contiguous and x.flags.writeable):
            raise ValueError("x: must be contiguous and writeable to be overwritten")
        fwht_(torch.from_numpy(x), normalize, order=order, transpose=transpose)
        return x
    n = _check(x, order)
    if not x.is_contiguous() or x.is_conj():
        raise ValueError(f"x: must be contiguous to be overwritten, its strides are {list(x.stride())}")
    if x.requires_grad:
        raise ValueError("x: wants gradients, which a transform in place does not give; call fwht")
    parts = torch.view_as_real(x) if x.is_complex() else x
    inner = 2 if x.is_complex() else 1
    signs = None if order == 1 else _signs(order, transpose, parts.dtype, x.device)
    fwht_rows(parts.view(-1, n * inner), signs, inner=inner, scale=1 / math.sqrt(n) if normalize else 1.0)
    return x


class _Transform(torch.autograd.Function):
    """y = x H; the gradient of x is that of y times H^T."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, normalize: bool, order: int, transpose: bool) -> Tensor:
        ctx.how = normalize, order, transpose
        return fwht(x.detach(), normalize, order=order, transpose=transpose)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        normalize, order, transpose = ctx.how
        return fwht(gradient.detach(), normalize, order=order, transpose=not transpose), None, None, None


def _check(x: Tensor, order: int) -> int:
    """N. Raises TypeError or ValueError for what cannot be transformed."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x: must be a tensor or an array, not {type(x).__name__}")
    if x.dtype not in TENSORS:
        raise ValueError(f"x: dtype {str(x.dtype).removeprefix('torch.')}, must be float32, float64, complex64 or complex128")
    if order != 1 and paley_order(order) is None:
        raise ValueError(f"order: Paley's constructions give no Hadamard matrix of order {order}")
    n = x.shape[-1] if x.dim() else 0
    power, rest = divmod(n, order)
    if rest or power < 1 or power & (power - 1):
        what = "a power of two" if order == 1 else f"{order} times a power of two"
        raise ValueError(f"x: shape {list(x.shape)}, its last dimension must be {what}")
    return n


@functools.lru_cache(maxsize=32)
def _signs(order: int, transpose: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    matrix = paley(order).to(device, dtype)
    return (matrix.mT if transpose else matrix).contiguous()
