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
from dither.kernels.packed_matmul import FEW_ROWS as FEW_ROWS  # of x: what a step of generation has at most
from dither.quant.inputs import InputRounding, not_finite

PLAIN = ("float16", "bfloat16", "float32")  # scales that kernels read

Multiply = Callable[[Tensor], Tensor]
"""``x [T, I]``, dense, float32 or bfloat16 -> ``[T, O]`` in the type of x."""

Inputs = InputRounding | None
"""How a layer rounds its inputs."""


@dataclass(frozen=True)
class Kind:
    """``suits(scheme, inputs, columns)``: by the records alone, before there are tensors. ``rounds``: x comes as it is, and the product rounds it as
    the layer's inputs say. ``most_rows``: None for any number. ``beats_kept``: faster than torch with a weight that is decoded already."""

    name: str
    suits: Callable[[WeightScheme, Inputs, int], bool]
    product: Callable[[QTensor, Inputs], Multiply]
    most_rows: int | None = FEW_ROWS
    rounds: bool = False
    beats_kept: bool = False

    def takes(self, rows: int) -> bool:
        return self.most_rows is None or rows <= self.most_rows


def cpu_kind(scheme: WeightScheme, inputs: Inputs, columns: int) -> Kind | None:
    """The first of `KINDS` for a layer of ``columns`` inputs, or None where its weight has to be decoded."""
    return next((kind for kind in KINDS if kind.suits(scheme, inputs, columns)), None)


@functools.cache
def _is_affine(scheme: WeightScheme) -> bool:
    """Whether weights are integers times plain scales, a group of a row at a time."""
    if not isinstance(scheme, Scheme) or not isinstance(scheme.format, Int) or scheme.blocks.height != 1:
        return False
    return scheme.format.scale in PLAIN and bool(scheme.format.sym or scheme.format.zero == "int")


def _zero(held: QTensor) -> Tensor | int:
    """Zero points of integer weights, one byte a group, or the one of all."""
    fmt = held.grid.format
    assert isinstance(fmt, Int)
    return fmt.middle if fmt.sym else held.params["zero_point"].to(torch.uint8)


def _affine(held: QTensor, inputs: Inputs) -> Multiply:
    """Beside the stored tensors it holds the zero points."""
    fmt, columns, zero = held.grid.format, held.shape[1], _zero(held)
    return kernels.PackedMatrix(held.stored["codes"], fmt.bits, held.stored["scale"], zero, held.grid.blocks.columns(columns), columns)


def token_grid(inputs: Inputs, columns: int) -> kernels.TokenGrid | None:
    """How inputs are rounded to integers, anew for each token, as the int8 products know it; None where they are not."""
    if inputs is None or inputs.names or inputs.shift is not None:
        return None
    scheme, fmt = inputs.scheme, inputs.scheme.format
    if scheme.clip is not None or scheme.blocks.height != 1 or scheme.blocks.columns(columns) < columns or not isinstance(fmt, Int):
        return None
    if fmt.scale not in PLAIN or not (fmt.sym or fmt.zero == "int"):
        return None
    return kernels.TokenGrid(fmt.bits, fmt.sym, getattr(torch, fmt.scale))


def _is_int8(scheme: WeightScheme, inputs: Inputs, columns: int) -> bool:
    """Whether both sides are integers, whose sums over a group an int32 holds. Without vectors, products of integers are slower than decoding."""
    if not _is_affine(scheme) or token_grid(inputs, columns) is None or kernels.backend() == "scalar":
        return False
    assert isinstance(scheme, Scheme)
    return min(scheme.blocks.columns(columns), columns) <= kernels.MOST_COLUMNS


@dataclass(frozen=True)
class RoundedProduct:
    """The product with inputs rounded by ``matrix``; ``scheme`` says how, in what is raised for NaN and inf."""

    matrix: kernels.Int8Matrix
    scheme: Scheme

    def __call__(self, x: Tensor) -> Tensor:
        y, finite = self.matrix.multiply(x)
        if not finite:
            raise not_finite(self.scheme)
        return y


def _int8(held: QTensor, inputs: Inputs) -> Multiply:
    """Beside the stored tensors it holds the zero points."""
    columns, stored = held.shape[1], held.stored
    grid = token_grid(inputs, columns)
    assert grid is not None and inputs is not None
    group = held.grid.blocks.columns(columns)
    matrix = kernels.Int8Matrix(stored["codes"], held.grid.format.bits, stored["scale"], _zero(held), group, columns, grid)
    return RoundedProduct(matrix, inputs.scheme)


def _is_float(scheme: WeightScheme, inputs: Inputs, columns: int) -> bool:
    """Whether weights are small floats, on blocks and scales of any kind."""
    return isinstance(scheme, Scheme) and isinstance(scheme.format, Float)


def _float(held: QTensor, inputs: Inputs) -> Multiply:
    """Beside the stored tensors it holds what each code means and, where blocks are taller than a row, a scale for each row."""
    fmt, blocks, (rows, columns) = held.grid.format, held.grid.blocks, held.shape
    assert isinstance(fmt, Float)
    scale = held.stored["scale"]
    if blocks.height != 1:
        of_row = blocks.row_groups(rows)
        scale = scale[of_row] if scale.element_size() > 1 else scale.view(torch.uint8)[of_row].view(scale.dtype)
    tensor_scale = float(held.stored["global_scale"]) if "global_scale" in held.stored else 1.0
    return kernels.PackedMatrix(
        held.stored["codes"], fmt.bits, scale, 0.0, blocks.columns(columns), columns, values=fmt.table(), tensor_scale=tensor_scale
    )


def _codebook(held: QTensor, inputs: Inputs) -> Multiply:
    """Beside the stored tensors it holds the books, places, groups and scales as numbers of 32 bits."""
    assert isinstance(held.scheme, Codebook)
    matrix: kernels.CodebookMatrix | None = None
    for part in reversed(held.scheme.parts(held.stored, held.shape)):
        matrix = kernels.CodebookMatrix(**part, columns=held.shape[1], beside=matrix)
    assert matrix is not None
    return matrix


def _partial(held: QTensor, inputs: Inputs) -> Multiply:
    """Beside the stored tensors it holds the bitmap of salient weights, where they are stored as a list, and levels and scales in float32."""
    scheme = held.scheme
    assert isinstance(scheme, PartialBinary)
    return kernels.PartialMatrix(*scheme.parts(held.stored, held.shape))


# Affine, for any number of rows: at 9 to 2048 the product takes less time than decoding and torch's linear, or as much to within 5 % where bfloat16
# meets layers of a few hundred inputs (benchmarks/records/packed_gemm.json has every case), and it never holds a decoded weight.
KINDS = (
    Kind("int8", _is_int8, _int8, most_rows=None, rounds=True, beats_kept=True),
    Kind("affine", lambda scheme, inputs, columns: _is_affine(scheme), _affine, most_rows=None),
    Kind("float", _is_float, _float, most_rows=None),
    Kind("codebook", lambda scheme, inputs, columns: isinstance(scheme, Codebook), _codebook),
    Kind("partial", lambda scheme, inputs, columns: isinstance(scheme, PartialBinary), _partial),
)
