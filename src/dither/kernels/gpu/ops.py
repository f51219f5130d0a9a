"""The few-bit products as operations of torch, so that torch.compile and torch.export see them whole:

    dither::packed_matmul(x, packed, scale, zero, bits, group)
    dither::int8_matmul(x, packed, scale, zero, input_scale)
    dither::float8_matmul(x, packed, scale, input_scale)

On CUDA tensors they are the Triton kernels; on the CPU the C++ kernel of `dither.kernels.packed_matmul`, and float64 sums for the other two. None
has a gradient: weights are few-bit codes, and a layer that is to be trained through decodes them first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dither.kernels.gpu import fp8, w8a8
from dither.kernels.gpu import packed_matmul as packed_
from dither.kernels.gpu.reference import float8_matmul_reference, int8_matmul_reference
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


@packed_matmul.register_kernel("cpu")
def _packed_on_cpu(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group: int) -> Tensor:
    points: Tensor | float = float(1 << bits - 1)
    if zero is not None:
        row = zero.new_zeros(1, packed_stride(scale.numel(), bits))
        if zero.dim() != 1 or zero.numel() != -(-scale.numel() * bits // 8):
            raise ValueError(f"zero: shape {list(zero.shape)}, must be [{-(-scale.numel() * bits // 8)}]")
        row[0, : zero.numel()] = zero
        points = unpack_rows(row, bits, scale.numel()).view(scale.shape)
    wide = x.float() if x.dtype == torch.float16 else x
    return on_cpu(wide, packed, bits, scale, points, group).to(x.dtype)


@int8_matmul.register_kernel("cpu")
def _int8_on_cpu(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, input_scale: str) -> Tensor:
    return int8_matmul_reference(x, packed, scale, zero, input_scale)


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


for _op, _name in ((packed_matmul, "packed_matmul"), (int8_matmul, "int8_matmul"), (float8_matmul, "float8_matmul")):
    _op.register_fake(_shape)
    _op.register_autograd(_no_backward, setup_context=_refusal(_name))
