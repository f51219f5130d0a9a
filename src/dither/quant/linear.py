"""Run-time modules that hold a `QTensor` in place of a float weight.

`QuantLinear` replaces Linear (and transformers' Conv1D, which is a Linear with its weight stored transposed); `QuantEmbedding` replaces
Embedding; `attach` gives any other module (convolutions, stacks of experts) a parameter that is decoded when it is read.
Their buffers carry the names of ``QTensor.tensors()``, so a module's state dict is exactly what is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dither.formats import QTensor, Scheme


class QuantWeight(nn.Module):
    """Holds the stored tensors of one `QTensor` as buffers."""

    def __init__(self, scheme: Scheme, shape: tuple[int, ...], tensors: dict[str, Tensor] | None = None) -> None:
        super().__init__()
        self.scheme = scheme
        self.shape = tuple(shape)
        for name, value in (tensors or QTensor.empty(scheme, self.shape, device="meta").tensors()).items():
            self.register_buffer(name, value)

    @classmethod
    def of(cls, tensor: QTensor) -> QuantWeight:
        return cls(tensor.scheme, tensor.shape, tensor.tensors())

    def qtensor(self) -> QTensor:
        stored = {name: buffer for name, buffer in self.named_buffers(recurse=False)}
        return QTensor.trusted(stored, self.scheme, self.shape)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return self.qtensor().dequantize(dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moves between devices, but never changes what is stored: ``model.half()`` must not touch codes or scales."""
        for name, buffer in list(self.named_buffers(recurse=False)):
            moved = fn(buffer)
            if moved.dtype != buffer.dtype:
                moved = buffer.to(moved.device)
            self._buffers[name] = moved
        for name, parameter in list(self.named_parameters(recurse=False)):
            self._parameters[name] = nn.Parameter(fn(parameter), requires_grad=parameter.requires_grad)
        return self


class QuantLinear(QuantWeight):
    """``y = x W_hat^T + b`` with ``W_hat [O, I]`` decoded from few bits."""

    def __init__(
        self,
        scheme: Scheme,
        in_features: int,
        out_features: int,
        bias: Tensor | None = None,
        tensors: dict[str, Tensor] | None = None,
    ) -> None:
        super().__init__(scheme, (out_features, in_features), tensors)
        self.in_features, self.out_features = in_features, out_features
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @classmethod
    def replace(cls, tensor: QTensor, bias: Tensor | None) -> QuantLinear:
        return cls(tensor.scheme, tensor.shape[1], tensor.shape[0], bias, tensor.tensors())

    @property
    def weight(self) -> Tensor:
        """The decoded weight ``[O, I]``, float32: for models that look at it."""
        return self.dequantize(torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dequantize(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.scheme}"


class QuantEmbedding(QuantWeight):
    """Rows of ``W_hat [V, D]``, decoded as they are looked up."""

    def __init__(
        self,
        scheme: Scheme,
        num: int,
        dim: int,
        padding_idx: int | None = None,
        tensors: dict[str, Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(scheme, (num, dim), tensors)
        self.num_embeddings, self.embedding_dim, self.padding_idx, self.dtype = num, dim, padding_idx, dtype

    @property
    def weight(self) -> Tensor:
        return self.dequantize(self.dtype)

    def forward(self, index: Tensor) -> Tensor:
        held = self.qtensor()
        if self.scheme.blocks.height != 1:  # blocks that span rows: decode all
            return held.dequantize(self.dtype)[index]
        rows, inverse = torch.unique(index, return_inverse=True)
        return held.rows(rows).dequantize(self.dtype)[inverse]


def as_stored(matrix: Tensor, shape: Sequence[int], *, swapped: bool) -> Tensor:
    """A decoded matrix (all rows of a stack of experts one after the other) in the shape in which its parameter is stored."""
    if swapped:
        return matrix.reshape(*shape[:-2], shape[-1], shape[-2]).mT
    return matrix.reshape(tuple(shape))


def attach(module: nn.Module, name: str, weight: QuantWeight, shape: tuple[int, ...], *, swapped: bool = False) -> None:
    """Replace parameter ``name`` of ``module``, of ``shape``, by one decoded from ``weight`` each time it is read.

    The stored tensors live in a child module ``{name}_quantized``; the module's class becomes a subclass with a property.
    ``swapped``: the parameter stores the matrix transposed, ``[..., I, O]``. Raises ValueError where there is no such parameter.
    """
    original = module._parameters.pop(name, None)
    if original is None:
        raise ValueError(f"{type(module).__name__} has no parameter {name!r}")
    dtype = original.dtype
    child = f"{name}_quantized"
    module.add_module(child, weight)

    def read(self: nn.Module) -> Tensor:
        held = self._modules[child]
        assert isinstance(held, QuantWeight)
        return as_stored(held.dequantize(dtype), shape, swapped=swapped)

    owner = type(module)
    module.__class__ = type(
        f"Quantized{owner.__name__}", (owner,), {name: property(read), "__module__": owner.__module__}
    )
