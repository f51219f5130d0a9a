"""The few-bit products as operations of torch, so that torch.compile and torch.export see them whole:

    dither::packed_matmul(x, packed, scale, zero, bits, group)
    dither::int8_matmul(x, packed, scale, zero, input_scale)
    dither::float8_matmul(x, packed, scale, input_scale)
    dither::rounded_matmul(x, packed, scale, zero, bits, group, input_bits, input_sym, input_scale)       on the CPU only

On CUDA tensors they are the Triton kernels; on the CPU the C++ kernels of `dither.kernels.packed_matmul` and `dither.kernels.int8_matmul`, and
float64 sums for the third. The last is int8_matmul for all that its C++ kernel takes; ``input_sym`` is "" for inputs with zero points. None has a
gradient: weights are few-bit codes, and a layer that is to be trained through decodes them first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dither.kernels.gpu import fp8, w8a8
from dither.kernels.gpu import packed_matmul as packed_
from dither.kernels.gpu.reference import float8_matmul_reference
from dither.kernels.gpu.rounded import scale_type
from dither.kernels.int8_matmul import Int8Matrix, TokenGrid
from dither.kernels.packed_matmul import packed_matmul as on_cpu
from dither.kernels.packing import packed_stride, unpack_rows


@torch.library.custom_op("dither::packed_matmul", mutates_args=(), device_types="cuda")
def packed_matmul(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group: int) -> Tensor:
    return packed_.packed_matmul(x, packed, scale, zero, bits, group)


@torch.library.custom_op("dither::int8_matmul", mutates_args=(), device_types="cuda")
def int8_matmul(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, input_scale: str) -> Tensor:
    return w8a8.int8_matmul(x, packed, scale, zero, input_scale)


@torch.library.custom_op("dither::float8_matmul", mutates_args=(), device_types="cuda")
def float8_matmul(x: Tensor, packed: Tensor, scale: Tensor, input_scale: str) -> Tensor:
    return fp8.float8_matmul(x, packed, scale, input_scale)


@torch.library.custom_op("dither::rounded_matmul", mutates_args=(), device_types="cpu")
def rounded_matmul(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group: int, input_bits: int, input_sym: str, input_scale: str
) -> Tensor:
    """Rows with NaN or inf become NaN, as in int8_matmul: what is traced does not look at values."""
    grid = TokenGrid(input_bits, input_sym or False, scale_type(input_scale))
    matrix = Int8Matrix(packed, bits, scale, 1 << bits - 1 if zero is None else _points(zero, bits, scale), group, x.shape[1], grid)
    return _rounded(matrix, x)


def _rounded(matrix: Int8Matrix, x: Tensor) -> Tensor:
    wide = x.float() if x.dtype == torch.float16 else x
    return matrix.multiply(wide)[0].to(x.dtype)


def _points(zero: Tensor, bits: int, scale: Tensor) -> Tensor:
    """Stored zero points, one stream over the whole grid, to uint8 of the shape of ``scale``."""
    size = -(-scale.numel() * bits // 8)
    if zero.dim() != 1 or zero.numel() != size:
        raise ValueError(f"zero: shape {list(zero.shape)}, must be [{size}]")
    row = zero.new_zeros(1, packed_stride(scale.numel(), bits))
    row[0, : zero.numel()] = zero
    return unpack_rows(row, bits, scale.numel()).view(scale.shape)


@packed_matmul.register_kernel("cpu")
def _packed_on_cpu(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group: int) -> Tensor:
    points = float(1 << bits - 1) if zero is None else _points(zero, bits, scale)
    wide = x.float() if x.dtype == torch.float16 else x
    return on_cpu(wide, packed, bits, scale, points, group).to(x.dtype)


@int8_matmul.register_kernel("cpu")
def _int8_on_cpu(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, input_scale: str) -> Tensor:
    if x.shape[1] == 0:
        return x.new_zeros(x.shape[0], packed.shape[0])
    matrix = Int8Matrix(packed, 8, scale, 128 if zero is None else zero[:, None], x.shape[1], x.shape[1], TokenGrid(scale=scale_type(input_scale)))
    return _rounded(matrix, x)


@float8_matmul.register_kernel("cpu")
def _float8_on_cpu(x: Tensor, packed: Tensor, scale: Tensor, input_scale: str) -> Tensor:
    return float8_matmul_reference(x, packed, scale, input_scale)


def _shape(x: Tensor, packed: Tensor, *rest: Any) -> Tensor:
    """What torch traces: the result's shape, type and device."""
    return x.new_empty(x.shape[0], packed.shape[0])


def _refusal(name: str) -> Any:
    """A gradient is asked for: refused in the forward pass already, where the reason still stands on the stack."""

    def refuse(ctx: Any, inputs: Any, output: Any) -> None:
        raise RuntimeError(f"dither::{name} has no gradient: decode the weights (QuantLinear.weight), or call it under torch.no_grad()")

    return refuse


def _no_backward(ctx: Any, gradient: Tensor) -> Any:
    raise RuntimeError("products with few-bit weights have no gradient")


for _op in (packed_matmul, int8_matmul, float8_matmul, rounded_matmul):
    _op.register_fake(_shape)
    _op.register_autograd(_no_backward, setup_context=_refusal(_op._name))
