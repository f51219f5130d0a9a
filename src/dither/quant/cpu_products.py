"""Which C++ kernel multiplies the codes of a linear layer themselves.

Each `Kind` says which weights and inputs it suits, makes the product of one stored matrix, and up to how many rows of x it is faster than decoding
the weight and calling torch. `KINDS` is in order of preference; `products` has those of GPUs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dither import kernels
from dither.formats import Codebook, Float, Int, PartialBinary, QTensor, Scheme, WeightScheme
from dither.quant.inputs import InputRounding

FEW_ROWS = 8  # of x: what a step of generation has at most
PLAIN = ("float16", "bfloat16", "float32")  # scales that kernels read

Multiply = Callable[[Tensor], Tensor]
"""``x [T, I]``, dense, float32 or bfloat16 -> ``[T, O]`` in the type of x."""


@dataclass(frozen=True)
class Kind:
    """``suits(scheme, inputs, columns)``: by the records alone, before there are tensors. ``rounds``: x comes as it is, and the product rounds it as
    the layer's inputs say. ``most_rows``: None for any number."""

    name: str
    suits: Callable[[WeightScheme, InputRounding | None, int], bool]
    product: Callable[[QTensor], Multiply]
    most_rows: int | None = FEW_ROWS
    rounds: bool = False

    def takes(self, rows: int) -> bool:
        return self.most_rows is None or rows <= self.most_rows


def cpu_kind(scheme: WeightScheme, inputs: InputRounding | None, columns: int) -> Kind | None:
    """The first of `KINDS` for a layer of ``columns`` inputs, or None where its weight has to be decoded."""
    return next((kind for kind in KINDS if kind.suits(scheme, inputs, columns)), None)


@functools.cache
def _is_affine(scheme: WeightScheme) -> bool:
    """Whether weights are integers times plain scales, a group of a row at a time."""
    if not isinstance(scheme, Scheme) or not isinstance(scheme.format, Int) or scheme.blocks.height != 1:
        return False
    return scheme.format.scale in PLAIN and bool(scheme.format.sym or scheme.format.zero == "int")


def _affine(held: QTensor) -> Multiply:
    """Beside the stored tensors it holds the zero points, one byte a group."""
    fmt, columns = held.grid.format, held.shape[1]
    assert isinstance(fmt, Int)
    zero = fmt.middle if fmt.sym else held.params["zero_point"].to(torch.uint8)
    return kernels.PackedMatrix(held.stored["codes"], fmt.bits, held.stored["scale"], zero, held.grid.blocks.columns(columns), columns)


def _is_float(scheme: WeightScheme) -> bool:
    """Whether weights are small floats, on blocks and scales of any kind."""
    return isinstance(scheme, Scheme) and isinstance(scheme.format, Float)


def _float(held: QTensor) -> Multiply:
    """Beside the stored tensors it holds what each code means and, where blocks are taller than a row, a scale for each row."""
    fmt, blocks, (rows, columns) = held.grid.format, held.grid.blocks, held.shape
    assert isinstance(fmt, Float)
    scale = held.stored["scale"]
    if blocks.height != 1:
        scale = scale.view(torch.uint8)[blocks.row_groups(rows)].view(scale.dtype) if scale.element_size() == 1 else scale[blocks.row_groups(rows)]
    tensor_scale = float(held.stored["global_scale"]) if "global_scale" in held.stored else 1.0
    return kernels.PackedMatrix(
        held.stored["codes"], fmt.bits, scale, 0.0, blocks.columns(columns), columns, values=fmt.table(), tensor_scale=tensor_scale
    )


def _codebook(held: QTensor) -> Multiply:
    """Beside the stored tensors it holds the books, places, groups and scales as numbers of 32 bits."""
    assert isinstance(held.scheme, Codebook)
    matrix: kernels.CodebookMatrix | None = None
    for part in reversed(held.scheme.parts(held.stored, held.shape)):
        matrix = kernels.CodebookMatrix(**part, columns=held.shape[1], beside=matrix)
    assert matrix is not None
    return matrix


def _partial(held: QTensor) -> Multiply:
    """Beside the stored tensors it holds the bitmap of salient weights, where they are stored as a list, and levels and scales in float32."""
    scheme = held.scheme
    assert isinstance(scheme, PartialBinary)
    return kernels.PartialMatrix(*scheme.parts(held.stored, held.shape))


KINDS = (
    Kind("affine", lambda scheme, inputs, columns: _is_affine(scheme), _affine),
    Kind("float", lambda scheme, inputs, columns: _is_float(scheme), _float),
    Kind("codebook", lambda scheme, inputs, columns: isinstance(scheme, Codebook), _codebook),
    Kind("partial", lambda scheme, inputs, columns: isinstance(scheme, PartialBinary), _partial),
)
