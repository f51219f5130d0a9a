"""Whether a row's functions (exp, tanh, cos, ...) come out the same wherever the row lies among others.

torch runs such a function over all elements of a tensor, two vectors at a time, and the last few, which fill no two vectors, by a scalar routine
that may round otherwise; above `_GRAIN` elements every thread gets a stretch of its own, with an end of its own. A row of w elements among n comes
out the same if, for every n that may be,

    n w  and  the length of a stretch, ceil(n w / threads),  are multiples of two vectors

What is correctly rounded (sums, products, roots) is the same in both routines. The functions that a model calls are watched, not known beforehand.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_GRAIN = 32768  # elements that torch gives one thread at the least
_BYTES = 2 * 64  # of two vectors, at the widest
_ROUNDED = {
    "abs", "ceil", "clamp", "clamp_max", "clamp_min", "clone", "copy", "copy_", "div", "div_", "floor", "maximum", "minimum", "mul", "mul_", "neg",
    "reciprocal", "relu", "round", "rsqrt", "sign", "sqrt", "square", "where", "_to_copy", "masked_fill", "masked_fill_", "fill", "fill_", "zero_",
}  # fmt: skip


class Watch(TorchDispatchMode):
    """While it is entered, collects the functions on tensors that have a dimension of ``rows``: ``widths`` holds (elements a row, bytes of one)."""

    def __init__(self, rows: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rows = rows
        self.widths: set[tuple[int, int]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if isinstance(output, Tensor) and output.is_floating_point() and self.rows in output.shape and _may_round_otherwise(func, args, kwargs or {}):
            self.widths.add((output.numel() // self.rows, output.element_size()))
        return output

    def safe(self, counts: Iterable[int]) -> bool:
        """Whether every row comes out the same among each of these numbers of rows, wherever it lies."""
        return all(_even(count * width, size) for count in counts for width, size in self.widths)


def _may_round_otherwise(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    name = func.overloadpacket.__name__
    if torch.Tag.pointwise not in func.tags or name in _ROUNDED:
        return False
    if name in ("add", "add_", "sub", "sub_"):  # a multiple of the second is added in one rounding or in two
        return bool(kwargs.get("alpha", 1) != 1)
    if name in ("pow", "pow_"):
        return not (len(args) > 1 and args[1] in (2, 0.5, -0.5, -1))
    return True


def _even(elements: int, size: int) -> bool:
    vectors = _BYTES // size
    stretches = min(torch.get_num_threads(), math.ceil(elements / _GRAIN))
    return elements % vectors == 0 and math.ceil(elements / stretches) % vectors == 0
