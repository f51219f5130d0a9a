"""Which kernel multiplies the codes of a linear layer themselves, on a GPU and while torch traces the model.

    packed    integer grids of 2, 4 or 8 bits: x as it comes, or as the layer's inputs round it
    int8      weights of 8 bits, one scale a row; inputs rounded to symmetric int8, one scale a token
    float8    weights of e4m3, one scale a row or a tensor; inputs rounded to e4m3, one scale a token

Everything else decodes its weight. On the CPU C++ kernels are called directly (`cpu_products`), except while torch.compile or torch.export
trace: they see the operations `dither::packed_matmul` and `dither::rounded_matmul`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dither.formats import Float, Int, Scheme, WeightScheme
from dither.kernels.gpu import presence
from dither.kernels.gpu.packed_matmul import TYPES, supports
from dither.quant.cpu_products import PLAIN, token_grid
from dither.quant.inputs import InputRounding

if TYPE_CHECKING:
    from dither.quant.linear import QuantLinear



def kernel_for(scheme: WeightScheme, inputs: InputRounding | None, columns: int) -> str | None:
    """ "packed", "int8", "float8", or None for a layer of ``columns`` inputs that decodes its weight."""
    if not isinstance(scheme, Scheme):
        return None
    whole = scheme.blocks.columns(columns) >= columns
    tall = scheme.blocks.height != 1
    match scheme.format:
        case Int(bits=bits, sym=sym, zero=zero, scale=scale) if scale in PLAIN and (sym or zero == "int") and not tall:
            if bits == 8 and whole and _by_token(inputs, Int(8, sym="restricted")):
                return "int8"
            return "packed" if supports(bits, scheme.blocks.columns(columns), columns) else None
        case Float(exponent=4, mantissa=3, finite=True, nan=True, scale=scale) if scale in PLAIN and whole:
            return "float8" if (not tall or scheme.blocks.kind == "tensor") and _by_token(inputs, Float(4, 3)) else None
    return None


def _by_token(inputs: InputRounding | None, fmt: Int | Float) -> bool:
    """Whether inputs are rounded to ``fmt``, whatever its scale is stored in, anew for each token."""
    if inputs is None or inputs.names or inputs.shift is not None:
        return False
    scheme = inputs.scheme
    if scheme.clip is not None or scheme.blocks.kind not in ("token", "channel") or not isinstance(scheme.format, (Int, Float)):
        return False
    return scheme.format.scale in PLAIN and scheme.format.to_json() | {"scale": fmt.scale} == fmt.to_json()


def product(layer: QuantLinear, x: Tensor) -> Tensor | None:
    """``x [..., I]``, not rounded yet -> ``x_hat W_hat^T``, without bias, or None where the layer is to decode its weight."""
    if x.device.type == "cpu" and torch.compiler.is_compiling() and (y := _rounded_on_cpu(layer, x)) is not None:
        return y
    kind = layer.kernel
    if kind is None or x.dtype not in TYPES or x.numel() == 0 or (x.requires_grad and torch.is_grad_enabled()):
        return None
    tracing = torch.compiler.is_compiling()
    if x.device.type == "cpu":
        if not (tracing and kind == "packed" and x.dtype != torch.float16):
            return None
    elif x.device.type != "cuda" or not (tracing or presence.has_triton()) or not (kind != "float8" or presence.has_float8(x.device)):
        return None  # what compiles for CUDA has triton
    if kind == "packed" and layer.inputs is not None:
        x = layer.inputs(x)
    rows = x.reshape(-1, layer.in_features).contiguous()
    return _multiplied(kind, layer, rows, tracing).view(*x.shape[:-1], layer.out_features)


def _rounded_on_cpu(layer: QuantLinear, x: Tensor) -> Tensor | None:
    """What torch traces of a layer whose C++ kernel rounds its inputs itself."""
    kind, grid = layer.cpu_kind, token_grid(layer.inputs, layer.in_features)
    if kind is None or kind.name != "int8" or grid is None or x.dtype not in TYPES or (x.requires_grad and torch.is_grad_enabled()):
        return None
    from dither.kernels.gpu import ops

    scheme = layer.scheme
    assert isinstance(scheme, Scheme)
    codes, scale, zero = layer.get_buffer("codes"), layer.get_buffer("scale"), layer._buffers.get("zero_point")
    width, about = scheme.blocks.columns(layer.in_features), (grid.bits, grid.sym or "", str(grid.scale).removeprefix("torch."))
    rows = x.reshape(-1, layer.in_features).contiguous()
    y: Tensor = ops.rounded_matmul(rows, codes, scale, zero, scheme.format.bits, width, *about)
    return y.view(*x.shape[:-1], layer.out_features)


def _multiplied(kind: str, layer: QuantLinear, rows: Tensor, tracing: bool) -> Tensor:
    """The operation while torch traces, which costs some ten microseconds a call; otherwise the function behind it."""
    from dither.kernels.gpu import ops
    from dither.kernels.gpu.fp8 import float8_matmul
    from dither.kernels.gpu.packed_matmul import packed_matmul
    from dither.kernels.gpu.w8a8 import int8_matmul

    scheme = layer.scheme
    assert isinstance(scheme, Scheme)
    codes, scale, zero = layer.get_buffer("codes"), layer.get_buffer("scale"), layer._buffers.get("zero_point")
    if kind == "packed":
        packed = ops.packed_matmul if tracing else packed_matmul
        return packed(rows, codes, scale, zero, scheme.format.bits, scheme.blocks.columns(layer.in_features))
    assert layer.inputs is not None
    input_scale = layer.inputs.scheme.format.to_json()["scale"]
    if kind == "int8":
        return (ops.int8_matmul if tracing else int8_matmul)(rows, codes, scale, zero, input_scale)
    return (ops.float8_matmul if tracing else float8_matmul)(rows, codes, scale, input_scale)
