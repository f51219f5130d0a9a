"""softmax, log-softmax and log-sum-exp of rows, by one of four algorithms that differ in how often memory is read and written.

    two_pass    (m, n) with e^x = m 2^n;  S 2^E = sum;  y = m / S 2^(n - E)       3 N numbers moved
    recompute   maximum;  sum of e^(x - max);  y = e^(x - max) / sum              4 N
    reload      maximum;  y = e^(x - max) and its sum;  y = y / sum               5 N
    online      sum of e^(x - max) with a maximum that grows;  y                  3 N, and one more exponential a block

Sources: Dukhan and Ablavatski, The Two-Pass Softmax Algorithm, 2020 (2001.04438); online: Milakov and Gimelshein, 2018 (1805.02867). Sums are
merged in double over chunks of fixed size, in their order, so the number of threads changes no bit; a row longer than a chunk is shared by threads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dither.kernels.caches import cache_bytes
from dither.kernels.checks import check
from dither.kernels.extension import extension, isa, threads
from dither.kernels.softmax_reference import (
    log_softmax_rows_reference,
    logsumexp_rows_reference,
    softmax_gradient_rows_reference,
    softmax_rows_reference,
)

SOFTMAX_ALGORITHMS = ("two_pass", "recompute", "reload", "online")  # in the order of csrc/softmax.hpp, as are the next two
NUMBERS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SOFTMAX, LOG_SOFTMAX, LOGSUMEXP = range(3)


def softmax_algorithm(row_bytes: int) -> str:
    """The algorithm for rows of ``row_bytes``: ``reload`` where the row and its result stay in the caches, which has the least arithmetic; else
    ``two_pass``. The limit, 8 second caches and a quarter of the third, was measured (benchmarks/records/softmax.json)."""
    return "reload" if row_bytes <= min(8 * cache_bytes(2), cache_bytes(3) // 4) else "two_pass"


def softmax_rows(x: Tensor, algorithm: str = "two_pass", *, stream: bool = False, out: Tensor | None = None) -> Tensor:
    """``y = e^x / sum e^x`` of each row of ``x [R, N]``, float32, float64, bfloat16 or float16; the same shape and dtype.

    Arithmetic is float32, of float64 float64; relative error below 1e-6 with ``two_pass``, else 1e-6 + 2^-24 (max - x), where y is above 1.2e-38;
    below, y may be 0. Rows of nothing but -inf, with +inf or with NaN give NaN. ``out`` takes the result and may be x, and nothing else that shares
    memory with it. ``stream`` writes past the caches, which is faster where nobody reads y soon and it does not fit; not with ``reload``, which reads
    what it wrote (of two-byte types from a float32 row of its own). Raises ValueError for other arguments.
    """
    _check(x)
    if algorithm not in SOFTMAX_ALGORITHMS:
        raise ValueError(f"algorithm: must be one of {', '.join(SOFTMAX_ALGORITHMS)}, not {algorithm!r}")
    if stream and algorithm == "reload":
        raise ValueError("stream: reload reads what it wrote; use another algorithm")
    y = _result(x, out)
    native = _native(x)
    if native is None:
        y.detach().copy_(softmax_rows_reference(x.detach(), algorithm))
        return y
    _call(native, x, SOFTMAX_ALGORITHMS.index(algorithm), SOFTMAX, stream, y)
    return y


def log_softmax_rows(x: Tensor, *, stream: bool = False, out: Tensor | None = None) -> Tensor:
    """``x - log sum e^x`` of each row of ``x [R, N]``, the sum as ``two_pass`` makes it; arguments, special rows and errors as `softmax_rows`."""
    _check(x)
    y = _result(x, out)
    native = _native(x)
    if native is None:
        y.detach().copy_(log_softmax_rows_reference(x.detach()))
        return y
    _call(native, x, 0, LOG_SOFTMAX, stream, y)
    return y


def logsumexp_rows(x: Tensor) -> Tensor:
    """``log sum e^x`` of each row of ``x [R, N]``: ``[R]`` float32, of float64 rows float64. Reads x once.

    Rows of nothing but -inf give -inf, with +inf +inf, with NaN NaN. Raises ValueError for other shapes, dtypes and strides.
    """
    _check(x)
    native = _native(x)
    if native is None:
        return logsumexp_rows_reference(x.detach())
    y = torch.empty(x.shape[0], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    _call(native, x, 0, LOGSUMEXP, False, y)
    return y


def softmax_gradient_rows(y: Tensor, g: Tensor) -> Tensor:
    """``y (g - <g, y>)`` of each row: the gradient of what went into the softmax ``y [R, N]``, whose own is ``g [R, N]``, of the same dtype.

    Raises ValueError for other shapes, dtypes and strides.
    """
    _check(y, "y")
    check("g", g, tuple(y.shape), (y.dtype,))
    native = _native(y) if g.device == y.device else None
    if native is None:
        return softmax_gradient_rows_reference(y.detach(), g.detach())
    dx = torch.empty_like(y)
    rows, columns = y.shape
    native.softmax_gradient(y.data_ptr(), g.data_ptr(), rows, columns, NUMBERS.index(y.dtype), dx.data_ptr(), isa(), threads())
    return dx


def _check(x: Tensor, name: str = "x") -> None:
    if x.__class__ is Tensor and x.dtype in NUMBERS and x.dim() == 2 and x.is_contiguous() and x.shape[1]:
        return  # what follows only finds out what is wrong, and takes longer than a short row
    check(name, x, (None, None), NUMBERS)
    if x.shape[1] == 0:
        raise ValueError(f"{name}: shape {list(x.shape)}, its rows are empty")


def _result(x: Tensor, out: Tensor | None) -> Tensor:
    """Where the result goes. Raises ValueError for an ``out`` that does not fit."""
    if out is None:
        return torch.empty_like(x, requires_grad=False)
    if not (out.__class__ is Tensor and out.dtype == x.dtype and out.shape == x.shape and out.is_contiguous()):
        check("out", out, tuple(x.shape), (x.dtype,))
    if out.device != x.device:
        raise ValueError(f"out: is on {out.device}, x on {x.device}")
    ahead = abs(out.data_ptr() - x.data_ptr())
    if 0 < ahead < x.numel() * x.element_size():
        raise ValueError("out: shares a part of its memory with x")
    return out


def _native(x: Tensor) -> Any | None:
    return extension() if x.is_cpu else None


def _call(native: Any, x: Tensor, algorithm: int, output: int, stream: bool, y: Tensor) -> None:
    rows, columns = x.shape
    kind = NUMBERS.index(x.dtype)
    native.softmax(x.data_ptr(), rows, columns, kind, algorithm, output, stream, y.data_ptr(), isa(), threads())
