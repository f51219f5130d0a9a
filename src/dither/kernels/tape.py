"""A list of instructions on tensors that stay where they are, run again and again in one C++ call: what a model does for one token, without torch.

    y = length                 how many tokens are before this one
    y = W[token], W[length]    a row of a table, packed (`PackedMatrix`) or dense
    y = f(a), f(a, b)          elements, broadcast as torch does; sums and means over the last axis
    y_i = x W_i^T              one row with several matrices, packed (`PackedMatrix`), packed for x rounded to integers (`Int8Matrix`) or dense: x is
                               prepared once for all that want it alike
    y = softmax(scale q K^T) V one query a head over all keys so far, to which this token's are added first

Several tokens, each of a sequence of its own, may be run at once (`Tape.run_rows`): matrices are then read once for all of them, everything else
goes row by row, and a row's results are, to the last bit, those it has alone. Many tokens of one sequence may be read at once (`Tape.read`): products
and attention are then those of prompts, whose sums go in another order.

Numbers are float32 in registers and rounded to the type of y, float32 or bfloat16. Time is that of reading the matrices once; an instruction on a few
hundred elements takes some tens of nanoseconds. Results do not depend on the number of threads. There is no torch reference: what is on a tape was
done by torch before (`dither.quant.program`), and is done so again where this extension is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dither.kernels.caches import cache_bytes
from dither.kernels.extension import extension, isa, threads
from dither.kernels.int8_matmul import GRIDS, Int8Matrix
from dither.kernels.packed_matmul import FEW_ROWS, SCALES, PackedMatrix
from dither.kernels.round import SCALE_TYPES

ELEMENTS = {torch.float32: 0, torch.bfloat16: 1}
FUNCTIONS = (
    "copy", "add", "sub", "mul", "div",
    "neg", "silu", "sigmoid", "relu", "gelu", "gelu_tanh", "exp", "tanh", "sin", "cos", "sqrt", "rsqrt", "reciprocal", "pow",
    "sum", "mean",
)  # fmt: skip
BINARY = ("add", "sub", "mul", "div", "pow")
REDUCTIONS = ("sum", "mean")
WIDEST_HEAD = 512
PANEL = 16  # keys that lie side by side
_AXES = 4


class Row(NamedTuple):
    """A token to run, and its sequence. ``layers``: the addresses of each layer's keys ``[G, capacity / PANEL, d, PANEL]`` and values
    ``[G, capacity, e]``, one after the other, dense, with room for token ``length``, which is this one; ``capacity`` is a multiple of `PANEL`;
    ``token`` is what is looked up."""

    layers: Sequence[int]
    length: int
    capacity: int
    token: int = 0


class Tape:
    """Holds the tensors that its instructions name. ``memory [T, bytes]`` uint8: what lies in its first row, each of up to T rows has for itself, at
    the same place in another row of it; what lies elsewhere is one for all, and only read. Raises RuntimeError where the extension is missing or
    switched off, ValueError for another memory."""

    def __init__(self, memory: Tensor | None = None) -> None:
        native = extension()
        if native is None:
            raise RuntimeError("a tape needs the C++ extension")
        if memory is not None and (memory.dim() != 2 or memory.dtype != torch.uint8 or memory.device.type != "cpu" or not memory.is_contiguous()):
            raise ValueError(f"memory: {list(memory.shape)} {memory.dtype} must be [T, bytes] uint8, dense, on the CPU")
        self._rows = 1 if memory is None else memory.shape[0]
        self._own = range(0) if memory is None else range(memory.data_ptr(), memory.data_ptr() + memory.shape[1])
        self._native: Any = native.Tape(self._own.start, len(self._own), len(self._own))
        self._held: list[Any] = [memory]

    def length(self, y: Tensor) -> None:
        """``y [1]`` float32: how many tokens are before the one that is run. ValueError for another."""
        self._hold("y", y)
        self._written(y)
        if y.dtype != torch.float32 or y.numel() != 1:
            raise ValueError(f"y: {list(y.shape)} {y.dtype} must be one float32")
        self._native.length(y.data_ptr())

    def lookup(self, weight: PackedMatrix | Tensor, y: Tensor, *, by_length: bool = False) -> None:
        """``y [I]``: a row of ``weight``, packed or ``[N, I]`` in the type of y; which one, `run` is told. Dense; ValueError for other shapes and
        types."""
        own, factors, shape = self._matrix(weight, y)
        if shape[1:] != list(y.shape) or not y.is_contiguous() or (isinstance(weight, Tensor) and weight.dtype != y.dtype):
            raise ValueError(f"weight: rows of {shape} are not a dense {list(y.shape)} of {y.dtype}")
        self._native.lookup(by_length, shape[1], own, factors)

    def elementwise(self, function: str, y: Tensor, a: Tensor, b: Tensor | float | None = None) -> None:
        """``y = f(a, b)`` with ``a`` and ``b`` broadcast to the shape of ``y``; of `REDUCTIONS`, ``y [..., 1]`` is made of ``a [..., n]``. ``pow``
        takes a number b. Raises ValueError for names, types, shapes that are not these, and for more than four axes that cannot be joined."""
        if function not in FUNCTIONS:
            raise ValueError(f"function: must be one of {', '.join(FUNCTIONS)}, not {function!r}")
        if (b is None) == (function in BINARY) or (function == "pow" and isinstance(b, Tensor)):
            raise ValueError(f"b: {function} takes {'a number' if function == 'pow' else 'one' if function in BINARY else 'none'}")
        self._hold("y", y, "a", a, *(("b", b) if isinstance(b, Tensor) else ()))
        if function in REDUCTIONS:
            if y.shape[:-1] != a.shape[:-1] or y.shape[-1:] != (1,):
                raise ValueError(f"y: shape {list(y.shape)}, must be that of a with one in the last axis, {list(a.shape)}")
            y = y.expand(a.shape)
        self._written(y)
        operands = [y, _broadcast("a", a, y), *([_broadcast("b", b, y)] if isinstance(b, Tensor) else [])]
        size, strides = _joined(operands, keep_last=function in REDUCTIONS)
        places = [(t.data_ptr(), ELEMENTS[t.dtype], *s) for t, s in zip(operands, strides, strict=True)]
        nothing = (0, 0, 0, 0, 0, 0)
        number = 0.0 if b is None or isinstance(b, Tensor) else float(b)
        self._native.elementwise(FUNCTIONS.index(function), size, *places, *[nothing] * (3 - len(places)), not isinstance(b, Tensor), number)

    def multiply(self, x: Tensor, matrices: Sequence[tuple[PackedMatrix | Int8Matrix | Tensor, Tensor]]) -> None:
        """``x [I]`` with each of ``matrices``, packed or ``[O, I]``, into its ``y [O]``. All dense; ValueError for other shapes and types. A packed
        matrix gives what it gives by itself, to the last bit."""
        self._hold("x", x)
        numbers, floats = [], []
        for weight, y in matrices:
            own, factors, shape = self._matrix(weight, y)
            if shape != [*y.shape, *x.shape] or not (x.is_contiguous() and y.is_contiguous()):
                raise ValueError(f"weight: {shape} does not take a dense {list(x.shape)} to a dense {list(y.shape)}")
            numbers.append(own)
            floats.append(factors)
        self._native.multiply(x.data_ptr(), ELEMENTS[x.dtype], x.numel(), numbers, floats)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, y: Tensor, scale: float) -> None:
        """``q [H, d]``, ``k [G, d]``, ``v [G, e]``, ``y [H, e]`` of one type, G divides H; ``layer``: of the keys and values that `run` is given.
        Raises ValueError for other shapes and types, and for heads wider than `WIDEST_HEAD`."""
        self._hold("q", q, "k", k, "v", v, "y", y)
        heads, groups, width, value_width = q.shape[0], k.shape[0], q.shape[1], v.shape[1]
        if k.shape[1] != width or v.shape[0] != groups or y.shape != (heads, value_width) or not groups or heads % groups:
            raise ValueError(f"k: shapes {[list(t.shape) for t in (q, k, v, y)]} are not [H, d], [G, d], [G, e], [H, e]")
        if len({t.dtype for t in (q, k, v, y)}) > 1 or max(width, value_width) > WIDEST_HEAD or y.stride(1) != 1:
            raise ValueError(f"q: types {[t.dtype for t in (q, k, v, y)]} must be one, heads at most {WIDEST_HEAD} wide, y dense in its last axis")
        self._written(y)
        places = [(t.data_ptr(), *t.stride()) for t in (q, k, v)]
        sizes = (heads, groups, width, value_width)
        self._native.attend(layer, sizes, scale, ELEMENTS[q.dtype], *places, (y.data_ptr(), y.stride(0)))

    def run(self, layers: Sequence[int], length: int, capacity: int, token: int = 0) -> None:
        """One row: the fields of a `Row`. The errors of `run_rows`, and ValueError where an x that is to be rounded holds NaN or inf."""
        _check_finite(self.run_rows([Row(layers, length, capacity, token)])[0])

    def run_rows(self, rows: Sequence[Row]) -> list[bool]:
        """Up to `FEW_ROWS` rows, and as many as the memory has, of sequences that share no keys and values. IndexError where a table has no such row;
        ValueError for other numbers. Of each row, whether every x that is to be rounded is finite; products of others are NaN, and no other row's
        affair. Not from two threads at once."""
        most = min(self._rows, FEW_ROWS)
        if not 0 < len(rows) <= most:
            raise ValueError(f"rows: must be 1 .. {most}, not {len(rows)}")
        for row in rows:
            _check_room(row, 1)
        finite: list[bool] = self._native.run([[row.length, row.capacity, row.token, *row.layers] for row in rows], isa(), threads())
        return finite

    def read(self, row: Row, tokens: Sequence[int]) -> None:
        """``tokens`` of one sequence, the first at the place of ``row``, whose own token is not used; as many as the memory has rows, or fewer. The
        last one is in row ``len(tokens) - 1``; from the last attention on, what there is to do is done for it alone. The same errors as of `run`."""
        if not 0 < len(tokens) <= self._rows:
            raise ValueError(f"tokens: must be 1 .. {self._rows}, not {len(tokens)}")
        _check_room(row, len(tokens))
        caches = cache_bytes(1), cache_bytes(2)
        _check_finite(self._native.read([row.length, row.capacity, 0, *row.layers], list(tokens), *caches, isa(), threads()))

    def _matrix(self, weight: PackedMatrix | Int8Matrix | Tensor, y: Tensor) -> tuple[list[int], list[float], list[int]]:
        """A matrix and its result as numbers (csrc/bindings_tape.cpp), and its shape."""
        self._hold("y", y)
        self._written(y)
        factors = [0.0] * 6
        if isinstance(weight, PackedMatrix | Int8Matrix):
            self._held.append(weight)
            scale, zero = weight.scale, weight.zero
            zeros, factors[0] = (zero.data_ptr(), 0.0) if isinstance(zero, Tensor) else (0, float(zero))
            own = [weight.packed.data_ptr(), weight.bits, weight.group, scale.data_ptr(), SCALES[scale.dtype], zeros]
            shape = [weight.packed.shape[0], weight.columns]
            if isinstance(weight, PackedMatrix):
                own.append(0 if weight.values is None else weight.values.data_ptr())
                factors[1] = weight.tensor_scale
            else:
                grid = weight.grid
                own += [0, GRIDS.index(grid.kind), SCALE_TYPES.index(grid.scale)]
                factors[2:] = grid.divisor, float(grid.lowest), float(grid.middle - 1), float(grid.middle)
        else:
            self._hold("weight", weight)
            if not weight.is_contiguous():
                raise ValueError(f"weight: {list(weight.shape)} must be dense")
            own, shape = [weight.data_ptr(), ELEMENTS[weight.dtype]], list(weight.shape)
        return [shape[0], y.data_ptr(), ELEMENTS[y.dtype], *own], factors, shape

    def _hold(self, *named: Any) -> None:
        for name, tensor in zip(named[::2], named[1::2], strict=True):
            if tensor.dtype not in ELEMENTS or tensor.device.type != "cpu":
                raise ValueError(f"{name}: {tensor.dtype} on {tensor.device}, must be float32 or bfloat16 on the CPU")
            self._held.append(tensor)

    def _written(self, y: Tensor) -> None:
        if self._rows > 1 and y.numel() and y.data_ptr() not in self._own:
            raise ValueError(f"y: a tensor of shape {list(y.shape)} lies outside the memory, where all {self._rows} rows would write to it")


def _check_room(row: Row, tokens: int) -> None:
    if not 0 <= row.length <= row.capacity - tokens or row.capacity % PANEL:
        raise ValueError(f"length: must be 0 .. capacity - {tokens} and capacity a multiple of {PANEL}, not {row.length} and {row.capacity}")


def _check_finite(finite: bool) -> None:
    if not finite:
        raise ValueError("x: a row that is to be rounded to integers holds NaN or inf")


def _broadcast(name: str, x: Tensor, y: Tensor) -> Tensor:
    try:
        return x.expand(y.shape)
    except RuntimeError:
        raise ValueError(f"{name}: shape {list(x.shape)} cannot be broadcast to {list(y.shape)}") from None


def _joined(operands: Sequence[Tensor], *, keep_last: bool) -> tuple[list[int], list[list[int]]]:
    """Sizes and strides on four axes, the same for all: axes of one element go, neighbours that all operands step through alike become one."""
    shape = operands[0].shape
    axes = [(n, [t.stride(i) for t in operands]) for i, n in enumerate(shape) if n != 1 or (keep_last and i == len(shape) - 1)]
    joined: list[tuple[int, list[int]]] = []
    for i, (n, steps) in enumerate(axes):
        last = keep_last and i == len(axes) - 1
        if joined and not last and all(outer == inner * n for outer, inner in zip(joined[-1][1], steps, strict=True)):
            joined[-1] = (joined[-1][0] * n, steps)
        else:
            joined.append((n, steps))
    if len(joined) > _AXES:
        raise ValueError(f"y: shape {list(shape)} has more than {_AXES} axes that cannot be joined")
    filled = [(1, [0] * len(operands))] * (_AXES - len(joined)) + joined
    return [n for n, _ in filled], [[steps[i] for _, steps in filled] for i in range(len(operands))]
