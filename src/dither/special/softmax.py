"""softmax, log-softmax and log-sum-exp along an axis, in two passes over memory instead of three.

    e^x = m 2^n,  n = round(x log2 e),  m in [sqrt(1/2), sqrt(2)]         extended numbers: neither m nor n can overflow
    S 2^E = sum_i m_i 2^n_i                                               pass 1: reads x
    y_i = m_i / S 2^(n_i - E)                                             pass 2: reads x, writes y
    log sum e^x = ln S + E ln 2,    log-softmax: x_i - ln S - E ln 2      from the same pair

The usual softmax needs the maximum first, a pass of its own, lest e^x overflow. Source: Dukhan and Ablavatski, The Two-Pass Softmax Algorithm, 2020
(2001.04438). Cost: 3 N numbers moved and 2 N exponentials a row of N, where three passes move 4 N (or 5 N and N exponentials). That pays
where a row leaves the caches; a row that stays in them is bound by arithmetic, and ``algorithm="auto"`` takes three passes there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dither import kernels

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ALGORITHMS = ("auto", *kernels.SOFTMAX_ALGORITHMS)
Array = TypeVar("Array", Tensor, np.ndarray)


def softmax(x: Array, dim: int = -1, algorithm: str = "auto", *, stream: bool = False, out: Array | None = None) -> Array:
    """``y = e^x / sum e^x`` along ``dim`` of ``x``: a tensor or a numpy array of any shape and strides, float32, float64, bfloat16 or float16.

    Same shape and dtype, and of the same kind. Domain: every number; a row (what lies along ``dim``) of nothing but -inf, with +inf or with NaN is
    NaN, as in torch. ``algorithm`` is "two_pass", "recompute", "reload" or "online" (`dither.kernels.softmax_rows`), "auto" the fastest for the
    length. Arithmetic is float32, of float64 float64: relative error below 1e-6 with "two_pass", with the others 1e-6 + 2^-24 (max - x); y below
    1.2e-38 may be 0. The number of threads changes no bit, the caches of another machine may, since "auto" goes by them.

    A ``dim`` that is not the densely stored last one costs a copy of x, as does a read-only array. ``out`` takes the result; it may be x itself.
    ``stream`` writes past the caches: faster for long rows whose result nobody reads soon. Tensors elsewhere than on the CPU go to torch,
    whatever the algorithm. Differentiable, once. Raises ValueError for other dtypes, a dim out of range or of size 0, an unknown
    algorithm, ``stream`` with "reload", and an ``out`` of another shape or dtype, or that shares a part of its memory with x.
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm: must be one of {', '.join(ALGORITHMS)}, not {algorithm!r}")
    if stream and algorithm == "reload":
        raise ValueError('stream: "reload" reads what it wrote; use another algorithm')

    def rows(row: Tensor, to: Tensor | None) -> Tensor:
        return _softmax(row, algorithm, stream, to)

    def differentiable(row: Tensor) -> Any:
        return _Softmax.apply(row, algorithm, stream)  # type: ignore[no-untyped-call]

    y: Array = _along(x, dim, out, rows, differentiable, torch.softmax)
    return y


def log_softmax(x: Array, dim: int = -1, *, stream: bool = False, out: Array | None = None) -> Array:
    """``x - log sum e^x`` along ``dim``; arguments, special rows, copies and errors as `softmax`, always in two passes.

    The sum is subtracted in two pieces, so the error is below 1e-6 max(1, |y|) in float32 however large x is.
    """

    def rows(row: Tensor, to: Tensor | None) -> Tensor:
        return kernels.log_softmax_rows(row, stream=stream, out=to)

    def differentiable(row: Tensor) -> Any:
        return _LogSoftmax.apply(row, stream)  # type: ignore[no-untyped-call]

    y: Array = _along(x, dim, out, rows, differentiable, torch.log_softmax)
    return y


def logsumexp(x: Array, dim: int = -1, *, keepdim: bool = False, dtype: torch.dtype | None = None) -> Array:
    """``log sum e^x`` along ``dim``, which is left out, or kept with size 1. Reads x once.

    Within 2 ulp + 1e-7 in float32. A row of nothing but -inf gives -inf, with +inf +inf, with NaN NaN. ``dtype`` is the result's, x's if not given:
    float32 keeps of a bfloat16 row what rounding would lose. Differentiable, once. Raises ValueError for other dtypes, a dim out of range or of
    size 0.
    """
    given = _tensor("x", x)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype: must be one of {', '.join(map(_short, DTYPES))}, not {_short(dtype)}")
    if isinstance(x, np.ndarray) and dtype == torch.bfloat16:
        raise ValueError("dtype: numpy has no bfloat16")
    at = _axis(given, dim)
    if given.device.type != "cpu":
        wide = given.float() if dtype == torch.float32 else given
        y = torch.logsumexp(wide, at, keepdim)
    elif given.dim() == 0:
        y = given.clone()
    else:
        moved = given.movedim(at, -1)
        rows = moved.reshape(-1, moved.shape[-1]).contiguous()
        sums: Tensor = _LogSumExp.apply(rows) if _differentiates(given) else kernels.logsumexp_rows(rows)  # type: ignore[no-untyped-call]
        y = sums.view(moved.shape[:-1])
        y = y.unsqueeze(at) if keepdim else y
    y = y.to(dtype or given.dtype)
    return y.numpy() if isinstance(x, np.ndarray) else y


def _softmax(rows: Tensor, algorithm: str, stream: bool, out: Tensor | None = None) -> Tensor:
    if algorithm == "auto":
        algorithm = kernels.softmax_algorithm(rows.shape[1] * rows.element_size())
        if stream and algorithm == "reload":
            algorithm = "two_pass"
    return kernels.softmax_rows(rows, algorithm, stream=stream, out=out)


class _Softmax(torch.autograd.Function):
    """dx = y (g - <g, y>)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, algorithm: str, stream: bool) -> Tensor:
        y = _softmax(rows, algorithm, stream)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (y,) = ctx.saved_tensors
        return kernels.softmax_gradient_rows(y, gradient.contiguous()), None, None


class _LogSoftmax(torch.autograd.Function):
    """dx = g - e^y sum g."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, stream: bool) -> Tensor:
        y = kernels.log_softmax_rows(rows, stream=stream)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        wide = torch.float64 if y.dtype == torch.float64 else torch.float32
        return torch.addcmul(gradient.to(wide), y.to(wide).exp(), gradient.sum(-1, keepdim=True, dtype=wide), value=-1).to(y.dtype), None


class _LogSumExp(torch.autograd.Function):
    """dx = g softmax(x)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        return kernels.logsumexp_rows(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (rows,) = ctx.saved_tensors
        return _softmax(rows, "auto", False) * gradient.unsqueeze(-1).to(rows.dtype)


def _along(
    x: Any,
    dim: int,
    out: Any,
    rows: Callable[[Tensor, Tensor | None], Tensor],
    differentiable: Callable[[Tensor], Any],
    elsewhere: Callable[..., Tensor],
) -> Any:
    """``rows [R, N] -> [R, N]`` along a dim of any tensor or array."""
    given = _tensor("x", x)
    at = _axis(given, dim)
    if out is not None and isinstance(out, np.ndarray) != isinstance(x, np.ndarray):
        raise ValueError(f"out: must be {'an array' if isinstance(x, np.ndarray) else 'a tensor'}, as x is, not {type(out).__name__}")
    to = None if out is None else _out(out, given)
    if given.device.type != "cpu":
        return elsewhere(given, at) if to is None else elsewhere(given, at, out=to)
    moved = (given if given.dim() else given.view(1)).movedim(at, -1)
    flat = moved.reshape(-1, moved.shape[-1]).contiguous()
    if to is None:
        y = differentiable(flat) if _differentiates(given) else rows(flat, None)
        y = y.view(moved.shape).movedim(-1, at).view(given.shape) if given.dim() else y.view(())
        return y.numpy() if isinstance(x, np.ndarray) else y
    back = (to if to.dim() else to.view(1)).movedim(at, -1)
    if back.is_contiguous():
        rows(flat, back.view(flat.shape))
    else:
        back.copy_(rows(flat, None).view(moved.shape))
    return out


def _tensor(name: str, x: Any) -> Tensor:
    """``x`` as a tensor over the same memory where torch can have it, else over a copy. Raises TypeError or ValueError."""
    if isinstance(x, np.ndarray):
        if x.dtype.kind != "f" or x.itemsize > 8:
            raise ValueError(f"{name}: must hold floating point numbers of 2, 4 or 8 bytes, not {x.dtype}")
        x = torch.from_numpy(x if _shared(x) else np.array(x, x.dtype.newbyteorder("="), order="C"))
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: must be a tensor or an array, not {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise ValueError(f"{name}: must hold floating point numbers, not {_short(x.dtype)}")
    if x.layout != torch.strided:
        raise ValueError(f"{name}: must be a dense tensor, not {x.layout}")
    return x


def _shared(x: np.ndarray) -> bool:
    """Whether torch takes the array as it is."""
    return x.flags.writeable and x.flags.aligned and x.dtype.isnative and all(s >= 0 and s % x.itemsize == 0 for s in x.strides)


def _out(out: Any, x: Tensor) -> Tensor:
    """``out`` as a tensor. Raises ValueError where it does not fit."""
    if isinstance(out, np.ndarray) and not _shared(out):
        raise ValueError(f"out: must be writable and aligned, with strides that are multiples of its numbers; its strides are {out.strides}")
    to = _tensor("out", out)
    if to.shape != x.shape or to.dtype != x.dtype or to.device != x.device:
        raise ValueError(
            f"out: is {_short(to.dtype)} {list(to.shape)} on {to.device}, must be {_short(x.dtype)} {list(x.shape)} on {x.device}, as x"
        )
    if torch.is_grad_enabled() and (x.requires_grad or to.requires_grad):
        raise ValueError("out: a result that is written there cannot be differentiated")
    same = to.data_ptr() == x.data_ptr() and to.stride() == x.stride()
    (begin, end), (first, last) = _span(x), _span(to)
    if x.numel() and not same and begin < last and first < end:
        raise ValueError("out: shares a part of its memory with x")
    if any(size > 1 and stride == 0 for size, stride in zip(to.shape, to.stride(), strict=True)):
        raise ValueError("out: several of its elements are one place in memory")
    return to.detach()


def _span(x: Tensor) -> tuple[int, int]:
    """The addresses between which its elements lie."""
    reach = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1
    return x.data_ptr(), x.data_ptr() + reach * x.element_size()


def _axis(x: Tensor, dim: int) -> int:
    """``dim`` counted from the front. Raises ValueError."""
    dims = max(x.dim(), 1)
    if not isinstance(dim, int) or not -dims <= dim < dims:
        raise ValueError(f"dim: must be an integer from {-dims} to {dims - 1} for x of shape {list(x.shape)}, not {dim!r}")
    at = dim % dims
    if x.dim() and x.shape[at] == 0:
        raise ValueError(f"dim: x of shape {list(x.shape)} has nothing along dimension {dim}")
    return at


def _differentiates(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
