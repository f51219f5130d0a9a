"""log I_v(x) and log K_v(x), and the ratio I_{v+1} / I_v, of any real order v >= 0 and x >= 0, without under- or overflow.

    I_v(x) = sum_k (x/2)^(2k+v) / (k! Gamma(k + v + 1)),      K_v(x) = int_0^inf exp(-x cosh t) cosh(v t) dt

Domain: 0 <= v <= 1e150, 0 <= x <= inf, limits included: log I_0(0) = 0, log I_v(0) = -inf for v > 0, log K_v(0) = inf, log I_v(inf) = inf,
log K_v(inf) = -inf. NaN gives NaN. The error is a few units in the last place of max(1, |log|), also where log I_v crosses 0, and a few of the
value for ratios and derivatives (`benchmarks/records/log_bessel.json`). Derivatives in x are exact formulas and may be repeated; there is no
elementary one in v.

Work: 100 to 1,300 floating point operations a pair, by region (`dither.kernels.bessel`). Memory: a few arrays of the result's size.
Source: Plesner, Sorensen and Hauberg, Accurate Computation of the Logarithm of Modified Bessel Functions on GPUs, ICS 2024, arXiv 2409.08729.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dither.kernels.bessel import log_bessel
from dither.kernels.bessel_shapes import SMALL_1
from dither.special.bessel_regions import regions_of
from dither.special.bessel_slopes import ratio_slope
from dither.special.bessel_tables import tables_on
from dither.special.rothwell import rothwell

FALLBACKS = ("trapezoid", "rothwell")


def log_iv(v: Any, x: Any, *, table: str = "tight", validate: bool = True) -> Any:
    """``log I_v(x)``, elementwise over the broadcast shapes of ``v`` and ``x``.

    Numbers, NumPy arrays or torch tensors on any device; a tensor where one of them is a tensor, else NumPy. float64 for float64 and integers,
    otherwise the wider floating type of the two arrays, rounded from float64; numbers adapt. ``table="paper"`` uses the paper's regions with its
    numbers of terms. Differentiable in x. Raises ValueError, naming the argument, for shapes that do not broadcast, types that are not real, and
    negative values; ``validate=False`` gives NaN for those values instead, without reading them. NotImplementedError if v requires grad.
    """
    return _call(lambda v, x: _Log.apply(x, v, "I", table, "trapezoid"), v, x, validate)  # type: ignore[no-untyped-call]


def log_kv(v: Any, x: Any, *, table: str = "tight", fallback: str = "trapezoid", validate: bool = True) -> Any:
    """``log K_v(x)``; arguments and errors as `log_iv`.

    For small x and v the integral by the trapezoidal rule, below x = 1 a series; ``fallback="rothwell"`` takes the paper's integral there, which
    is slow and good for nine digits.
    """
    if fallback not in FALLBACKS:
        raise ValueError(f"fallback: must be {' or '.join(map(repr, FALLBACKS))}, not {fallback!r}")
    return _call(lambda v, x: _Log.apply(x, v, "K", table, fallback), v, x, validate)  # type: ignore[no-untyped-call]


def bessel_ratio(v: Any, x: Any, *, validate: bool = True) -> Any:
    """``A_v(x) = I_{v+1}(x) / I_v(x)``, in [0, 1]; arguments and errors as `log_iv`. To full relative precision, also where it is tiny."""
    return _call(lambda v, x: _Ratio.apply(x, v, "I"), v, x, validate)  # type: ignore[no-untyped-call]


# -- derivatives in x: each function's backward is made of functions below it -----------------------------------------------------


class _Log(torch.autograd.Function):
    """log of the function: v/x + A for I, -(v/x + B) for K."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, v: Tensor, kind: str, table: str, fallback: str) -> Tensor:
        ctx.save_for_backward(x, v)
        ctx.kind = kind
        regions = None if table == "tight" else regions_of(v, x, table)
        value = log_bessel(kind, v, x, tables_on(v.device), regions=regions).value
        if fallback == "rothwell":
            small = (regions_of(v, x, table) >= SMALL_1) & (x > 0) & (x < torch.inf) & (v < torch.inf)
            value[small] = rothwell(v[small], x[small])
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        x, v = ctx.saved_tensors
        slope = torch.where(v > 0, v / x, 0) + _Ratio.apply(x, v, ctx.kind)  # type: ignore[no-untyped-call]
        return gradient * (slope if ctx.kind == "I" else -slope), None, None, None, None


class _Ratio(torch.autograd.Function):
    """A = I_{v+1} / I_v or B = K_{v-1} / K_v."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, v: Tensor, kind: str) -> Tensor:
        ratio = log_bessel(kind, v, x, tables_on(v.device), ratio=True).ratio
        assert ratio is not None
        ctx.save_for_backward(x, v)
        ctx.kind = kind
        return ratio

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient * _RatioSlope.apply(*ctx.saved_tensors, ctx.kind), None, None  # type: ignore[no-untyped-call]


class _RatioSlope(torch.autograd.Function):
    """A' or B'; its own derivative is that of the Riccati equations A' = 1 - A^2 - (2v+1) A/x and B' = B^2 + (2v-1) B/x - 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, v: Tensor, kind: str) -> Tensor:
        ctx.save_for_backward(x, v)
        ctx.kind = kind
        ratio = log_bessel(kind, v, x, tables_on(v.device), ratio=True).ratio
        assert ratio is not None
        return ratio_slope(kind, v, x, ratio)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        x, v = ctx.saved_tensors
        ratio, slope = _Ratio.apply(x, v, ctx.kind), _RatioSlope.apply(x, v, ctx.kind)  # type: ignore[no-untyped-call]
        sign, order = (-1.0, 2 * v + 1) if ctx.kind == "I" else (1.0, 2 * v - 1)
        return gradient * sign * (2 * ratio * slope + order * (slope - ratio / x) / x), None, None


# -- arguments -------------------------------------------------------------------------------------------------------------------


def _call(run: Callable[[Tensor, Tensor], Tensor], v: Any, x: Any, validate: bool) -> Any:
    """``run`` on flat float64 tensors, and its result as the caller gave its arguments."""
    orders, arguments = as_tensor("v", v), as_tensor("x", x)
    if orders.requires_grad:
        raise NotImplementedError("v: requires grad, but there is no elementary derivative in the order; pass v.detach()")
    device = next((t.device for given, t in ((x, arguments), (v, orders)) if isinstance(given, Tensor) and t.dim()), arguments.device)
    try:
        shape = np.broadcast_shapes(tuple(orders.shape), tuple(arguments.shape))
    except ValueError:
        raise ValueError(f"x: shape {list(arguments.shape)} does not broadcast with that of v, {list(orders.shape)}") from None
    if validate:
        for name, tensor in (("v", orders), ("x", arguments)):
            refuse_negative(name, tensor)
    dtype = result_type(v, orders, x, arguments)
    flat = (t.to(device, torch.float64).expand(shape).reshape(-1).contiguous() for t in (orders, arguments))
    result = run(*flat).reshape(shape).to(dtype)
    if isinstance(v, Tensor) or isinstance(x, Tensor):
        return result
    return result.numpy() if shape else result.numpy()[()]


def as_tensor(name: str, value: Any) -> Tensor:
    """A tensor of a real type; no copy of NumPy arrays. Raises ValueError for other types."""
    if not isinstance(value, Tensor):
        array = np.asarray(value)
        if array.dtype.kind not in "iuf":
            raise ValueError(f"{name}: must hold real numbers, not {array.dtype}")
        if array.dtype.itemsize > 8:
            raise ValueError(f"{name}: must be float64 or narrower, not {array.dtype}")
        value = torch.from_numpy(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")).reshape(array.shape))
    if value.dtype.is_complex or value.dtype == torch.bool:
        raise ValueError(f"{name}: must hold real numbers, not {value.dtype}")
    tensor: Tensor = value
    return tensor


def refuse_negative(name: str, tensor: Tensor) -> None:
    """Raises ValueError that shows the first negative value."""
    below = tensor.detach() < 0
    if bool(below.any()):
        raise ValueError(f"{name}: must not be negative, but holds {tensor.detach()[below].flatten()[0].item():g}")


def result_type(*pairs: Any) -> torch.dtype:
    """float64, unless a floating array or tensor is narrower; Python numbers and integers have no say."""
    given = [(pairs[i], pairs[i + 1]) for i in range(0, len(pairs), 2)]
    floating = [t.dtype for value, t in given if not isinstance(value, int | float) and t.dtype.is_floating_point]
    integers = any(not isinstance(value, int | float) and not t.dtype.is_floating_point for value, t in given)
    if not floating or integers:
        return torch.float64
    widest: torch.dtype = functools.reduce(torch.promote_types, floating)
    return widest
