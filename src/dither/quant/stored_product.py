"""Products with stored weights as one operation of torch, so that torch.compile and torch.export see layers whole on the CPU, whatever the storage:

    dither::stored_matmul(x, stored, names, scheme, outputs)        x [..., I] -> x W_hat^T [..., outputs]

`products` has those of GPUs, and of layers that round their inputs in the product.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.weak import TensorWeakRef

from dither.formats import QTensor, WeightScheme
from dither.formats.stored import scheme_from_json
from dither.kernels.extension import extension
from dither.quant.cpu_products import Kind, Multiply, cpu_kind

_made: dict[int, tuple[TensorWeakRef, Any, Multiply]] = {}
"""Products by the first of their tensors, until that is gone."""


@torch.library.custom_op("dither::stored_matmul", mutates_args=(), device_types="cpu")
def stored_matmul(x: Tensor, stored: list[Tensor], names: str, scheme: str, outputs: int) -> Tensor:
    """``stored``: the tensors ``names``, separated by commas, of a weight ``[outputs, I]``; ``scheme``: its record as JSON."""
    columns = x.shape[-1]
    rows = x.reshape(-1, columns).contiguous()
    held = QTensor.trusted(dict(zip(names.split(","), stored, strict=True)), scheme_from_json(json.loads(scheme)), (outputs, columns))
    kind = cpu_kind(held.scheme, None, columns)
    wide = rows.float() if rows.dtype == torch.float16 else rows
    if kind is None or extension() is None or not kind.takes(len(rows)) or wide.dtype not in (torch.float32, torch.bfloat16):
        y = linear(rows, held.dequantize(rows.dtype))
    else:
        y = _product(held, kind, scheme)(wide).to(x.dtype)
    return y.view(*x.shape[:-1], outputs)


def _product(held: QTensor, kind: Kind, scheme: str) -> Multiply:
    """Made once for tensors that stay as they are."""
    stored = list(held.stored.values())
    state = scheme, [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in stored]
    known = _made.get(id(stored[0]))
    if known is None or known[0]() is not stored[0] or known[1] != state:
        for gone in [key for key, (first, _, _) in _made.items() if first() is None]:
            del _made[gone]
        known = _made[id(stored[0])] = TensorWeakRef(stored[0]), state, kind.product(held, None)
    return known[2]


@stored_matmul.register_fake
def _shape(x: Tensor, stored: list[Tensor], names: str, scheme: str, outputs: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], outputs)


def _refuse(ctx: Any, inputs: Any, output: Any) -> None:
    raise RuntimeError("dither::stored_matmul has no gradient: decode the weights (QuantLinear.weight), or call it under torch.no_grad()")


def _no_backward(ctx: Any, gradient: Tensor) -> Any:
    raise RuntimeError("products with few-bit weights have no gradient")


stored_matmul.register_autograd(_no_backward, setup_context=_refuse)


def record(scheme: WeightScheme) -> str:
    """What `stored_matmul` is told of the storage."""
    return json.dumps(scheme.to_json(), sort_keys=True)


def traced(x: Tensor, stored: Mapping[str, Tensor], scheme: str, outputs: int) -> Tensor:
    """The operation on a layer's buffers."""
    y: Tensor = stored_matmul(x, list(stored.values()), ",".join(stored), scheme, outputs)
    return y
