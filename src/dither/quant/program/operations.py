"""Operations of torch as instructions: what a recorder writes for each that a score may depend on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from dither.quant.program.instructions import Unrecordable


class Writer(Protocol):
    """Writes instructions down."""

    def elementwise(self, function: str, y: Tensor, a: Tensor, b: Any = None) -> None: ...

    def done(self, function: str, a: Tensor, *b: Any) -> Tensor:
        """Of `DONE`, in float32: done now and written down."""


Write = Callable[["Writer", Tensor, Sequence[Any], dict[str, Any]], None]


def _binary(name: str) -> Write:
    def write(to: Writer, y: Tensor, args: Sequence[Any], options: dict[str, Any]) -> None:
        a, b = args[:2]
        if options.get("alpha", 1) != 1 or options.get("rounding_mode") is not None or len(args) > 2:
            raise Unrecordable(f"{name} with {options or args[2:]}")
        if not isinstance(a, Tensor):
            a = torch.full_like(y, a)
        to.elementwise(name, y, a, b)

    return write


def _unary(name: str) -> Write:
    def write(to: Writer, y: Tensor, args: Sequence[Any], options: dict[str, Any]) -> None:
        if name == "gelu" and options.get("approximate", args[1] if len(args) > 1 else "none") == "tanh":
            to.elementwise("gelu_tanh", y, args[0])
        else:
            to.elementwise(name, y, args[0])

    return write


def _pow(to: Writer, y: Tensor, args: Sequence[Any], options: dict[str, Any]) -> None:
    if isinstance(args[1], Tensor) or not isinstance(args[0], Tensor):
        raise Unrecordable("a power that is no number")
    to.elementwise("pow", y, args[0], float(args[1]))


def _reduced(name: str) -> Write:
    def write(to: Writer, y: Tensor, args: Sequence[Any], options: dict[str, Any]) -> None:
        a, axes = args[0], args[1] if len(args) > 1 else None
        if axes is None or [i % a.dim() for i in axes] != [a.dim() - 1]:
            raise Unrecordable(f"{name} over other axes than the last")
        to.elementwise(name, y.view(*a.shape[:-1], 1), a)

    return write


def _cat(to: Writer, y: Tensor, args: Sequence[Any], options: dict[str, Any]) -> None:
    axis, at = args[1] if len(args) > 1 else options.get("dim", 0), 0
    for piece in args[0]:
        to.elementwise("copy", y.narrow(axis, at, piece.shape[axis]), piece)
        at += piece.shape[axis]


def _outer(to: Writer, y: Tensor, args: Sequence[Any], options: dict[str, Any]) -> None:
    """Matrix products over one element, as of frequencies and a place."""
    a, b = args
    if a.shape[-1] != 1:
        raise Unrecordable("a product of matrices that are both no weights")
    to.elementwise("mul", y, a, b)


def _layer_norm(to: Writer, y: Tensor, args: Sequence[Any], options: dict[str, Any]) -> None:
    """(x - mean) / sqrt(variance + eps), times a weight, plus a bias, in float32."""
    x, shape, weight, bias, eps = args
    if list(shape) != [x.shape[-1]]:
        raise Unrecordable("a layer norm over more than one axis")
    centred = to.done("sub", x, to.done("mean", x))
    variance = to.done("mean", to.done("mul", centred, centred))
    last, factor = centred, to.done("rsqrt", to.done("add", variance, float(eps)))
    steps = [(name, operand) for name, operand in (("mul", factor), ("mul", weight), ("add", bias)) if operand is not None]
    for name, operand in steps[:-1]:
        last = to.done(name, last, operand)
    to.elementwise(steps[-1][0], y, last, steps[-1][1])


DONE: dict[str, Callable[..., Tensor]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "rsqrt": torch.rsqrt, "mean": lambda x: x.mean(-1, keepdim=True),
}  # fmt: skip

OPERATIONS: dict[str, Write] = {
    **{name: _binary(name) for name in ("add", "sub", "mul", "div")},
    **{
        name: _unary(name)
        for name in ("neg", "silu", "sigmoid", "relu", "gelu", "exp", "tanh", "sin", "cos", "sqrt", "rsqrt", "reciprocal")
    },
    **{name: _unary("copy") for name in ("_to_copy", "clone")},
    **{name: _reduced(name) for name in ("sum", "mean")},
    "pow": _pow,
    "cat": _cat,
    "bmm": _outer,
    "native_layer_norm": _layer_norm,
}
