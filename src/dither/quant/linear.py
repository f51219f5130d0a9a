"""Run-time modules that hold a `QTensor` in place of a float weight.

`QuantLinear` replaces Linear (and transformers' Conv1D, which is a Linear with its weight stored transposed); `QuantEmbedding` replaces
Embedding; `attach` gives any other module (convolutions, stacks of experts) a parameter that is decoded when it is read; `share` lets
a head read the quantized embedding that it is tied to. Their buffers carry the names of ``QTensor.tensors()``, so a module's state dict is
exactly what is stored.

Linear layers for which there is a kernel multiply the codes themselves, on the CPU (`cpu_products`) and on a GPU (`products`), for any number of
rows. Other weights are decoded each time they are used, so a model takes the memory of its few bits; over a window of tokens the decoding is a small
part of the work. `decoded` keeps decoded weights for a while.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from dither.formats import QTensor, Scheme, WeightScheme
from dither.kernels.extension import extension
from dither.kernels.gpu.presence import has_triton
from dither.kernels.packed_matmul import PackedMatrix
from dither.quant.cpu_products import Kind, Multiply, cpu_kind
from dither.quant.inputs import InputRounding
from dither.quant.products import kernel_for, product
from dither.quant.stored_product import record, traced


class QuantWeight(nn.Module):
    """Holds the stored tensors of one `QTensor` as buffers. ``dtype``: what `weight` decodes to; it follows ``model.half()`` and the like."""

    def __init__(
        self,
        scheme: WeightScheme,
        shape: tuple[int, ...],
        tensors: dict[str, Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.scheme, self.shape, self.dtype = scheme, tuple(shape), dtype
        self._keeps = False
        self._kept: Tensor | None = None
        self._product: Multiply | None = None
        self._record = record(scheme)
        for name, value in (tensors or QTensor.empty(scheme, self.shape, device="meta").tensors()).items():
            self.register_buffer(name, value)

    @classmethod
    def of(cls, tensor: QTensor, dtype: torch.dtype = torch.float32) -> QuantWeight:
        return cls(tensor.scheme, tensor.shape, tensor.tensors(), dtype)

    @property
    def weight(self) -> Tensor:
        """The decoded weight ``[O, I]`` in ``dtype``: for models that look at it."""
        return self.dequantize(self.dtype)

    def qtensor(self) -> QTensor:
        stored = {name: buffer for name, buffer in self.named_buffers(recurse=False)}
        return QTensor.trusted(stored, self.scheme, self.shape)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The decoded weight ``[O, I]``. Within `decoded` it may be the one made before: do not write to it."""
        if self._kept is not None and self._kept.dtype == dtype:
            return self._kept
        values = self.qtensor().dequantize(dtype)
        if self._keeps:
            self._kept = values
        return values

    def keep(self, on: bool) -> None:
        """Whether to keep the weight once it is decoded; see `decoded`. Off drops it."""
        self._keeps, self._kept = on, None

    @property
    def cpu_kind(self) -> Kind | None:
        """The kernel that multiplies the codes themselves on a CPU, by what is stored alone."""
        return cpu_kind(self.scheme, None, self.shape[1])

    @property
    def rounding(self) -> InputRounding | None:
        """How inputs of the product are rounded, where a product rounds them itself."""
        return None

    @property
    def multiplies_codes(self) -> bool:
        """Whether products need no decoded weight, of a few rows at least."""
        return self.cpu_kind is not None and self.device.type == "cpu" and extension() is not None

    @property
    def never_decodes(self) -> bool:
        """Whether products of any number of rows are faster without a decoded weight, even one that is kept."""
        kind = self.cpu_kind
        return kind is not None and kind.beats_kept and self.multiplies_codes and self.dtype in (torch.float32, torch.bfloat16)

    @property
    def device(self) -> torch.device:
        return next(buffer for buffer in self._buffers.values() if buffer is not None).device

    def product(self, x: Tensor) -> Tensor | None:
        """``x [..., I] -> x W_hat^T`` by a kernel that reads codes, or None where decoding the weight is faster, or is all that can be done."""
        kind = self.cpu_kind
        if kind is None or self._keeps or x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16):
            return None
        columns = self.shape[1]
        if x.numel() == 0 or x.shape[-1] != columns or not kind.takes(x.numel() // columns):
            return None
        if x.requires_grad and torch.is_grad_enabled():
            return None
        if torch.compiler.is_compiling():
            stored = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
            return None if kind.rounds else traced(x, stored, self._record, self.shape[0])
        if not self.multiplies_codes:
            return None
        return self.multiplier(kind)(x.reshape(-1, columns).contiguous()).view(*x.shape[:-1], self.shape[0])

    def multiplier(self, kind: Kind) -> Multiply:
        """The product with what is stored, made once."""
        if self._product is None:
            self._product = kind.product(self.qtensor(), self.rounding)
        return self._product

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._kept = self._product = None
        super()._load_from_state_dict(*args, **kwargs)

    def check(self) -> None:
        """Raises CheckpointError where the buffers are not what the scheme says: missing, of another size or type, not finite."""
        QTensor.from_tensors(dict(self.named_buffers(recurse=False)), self.scheme, self.shape)

    def restore_types(self) -> None:
        """Give floating buffers back the types they are stored in, after a loader that casts whole models (wider types lose nothing)."""
        self._product = None
        for name, like in QTensor.empty(self.scheme, self.shape, device="meta").tensors().items():
            if (buffer := self.get_buffer(name)).is_floating_point() and like.is_floating_point():
                self._buffers[name] = buffer.to(like.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moves between devices, but never changes what is stored: ``model.half()`` must not touch codes or scales."""
        self._kept = self._product = None
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        for name, buffer in list(self.named_buffers(recurse=False)):
            moved = fn(buffer)
            if moved.dtype != buffer.dtype:
                moved = buffer.to(moved.device)
            self._buffers[name] = moved
        for child in self.children():
            child._apply(fn)  # type: ignore[no-untyped-call]
        for name, parameter in list(self.named_parameters(recurse=False)):
            self._parameters[name] = nn.Parameter(fn(parameter), requires_grad=parameter.requires_grad)
        return self


@contextmanager
def decoded(model: nn.Module, budget: int | None = None, *, few_rows: bool = False) -> Iterator[None]:
    """Within it, few-bit layers of ``model`` keep their weights once decoded, so that a call costs what the float layer costs. ``few_rows``: calls
    are of a few tokens; linear layers that multiply codes stay as they are.

    Layers with int8 products stay as they are too, which is faster than a kept weight. Results are those of torch's products with the decoded
    weight: for layers that decode outside too the same to the last bit, for those that multiply codes up to the order of sums. Memory: up to 4
    bytes a weight (2 in a model of bfloat16 or float16), for the first layers that fit ``budget`` bytes (None: half of the memory that is free
    now); the others decode at each call, as they do outside, and embeddings that no head shares decode the rows looked up. Stored tensors must
    not change meanwhile. Where uses nest, the outer one decides.
    """
    left = psutil.virtual_memory().available // 2 if budget is None else budget
    size = max((p.element_size() for p in model.parameters() if p.is_floating_point()), default=4)
    shared = [m.embedding for m in model.modules() if isinstance(m, SharedLinear)]
    chosen = []
    for module in model.modules():
        rows_only = isinstance(module, QuantEmbedding) and module not in shared
        quick = False
        if isinstance(module, QuantLinear) or module in shared:
            assert isinstance(module, QuantWeight)
            quick = module.never_decodes or (few_rows and module.multiplies_codes) or (isinstance(module, QuantLinear) and module.on_gpu)
        if isinstance(module, QuantWeight) and not rows_only and not quick and not module._keeps:
            need = size * torch.Size(module.shape).numel()
            if need <= left:
                left -= need
                chosen.append(module)
    try:
        for module in chosen:
            module.keep(True)
        yield
    finally:
        for module in chosen:
            module.keep(False)


class QuantLinear(QuantWeight):
    """``y = x_hat W_hat^T + b`` with ``W_hat [O, I]`` decoded from few bits, and x rounded first where ``inputs`` is given."""

    def __init__(
        self,
        scheme: WeightScheme,
        in_features: int,
        out_features: int,
        bias: Tensor | None = None,
        tensors: dict[str, Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
        inputs: InputRounding | None = None,
    ) -> None:
        super().__init__(scheme, (out_features, in_features), tensors, dtype)
        self.inputs = inputs
        self.kernel = kernel_for(scheme, inputs, in_features)
        self._kind = cpu_kind(scheme, inputs, in_features)
        self.in_features, self.out_features = in_features, out_features
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @classmethod
    def replace(cls, tensor: QTensor, bias: Tensor | None) -> QuantLinear:
        return cls(tensor.scheme, tensor.shape[1], tensor.shape[0], bias, tensor.tensors())

    @property
    def cpu_kind(self) -> Kind | None:
        return self._kind

    @property
    def rounding(self) -> InputRounding | None:
        return self.inputs

    @property
    def on_gpu(self) -> bool:
        """Whether products are those of a GPU kernel, of any number of rows."""
        codes = self._buffers.get("codes")
        return codes is not None and codes.device.type == "cuda" and self.kernel is not None and has_triton()

    def forward(self, x: Tensor) -> Tensor:
        if not self._keeps and (x.is_cuda or torch.compiler.is_compiling()) and (y := product(self, x)) is not None:
            return y if self.bias is None else y + self.bias.to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        late = self._kind is not None and self._kind.rounds  # the product rounds x itself
        if self.inputs is not None and not late:
            x = self.inputs(x)
        if (y := self.product(x)) is not None:
            return y if bias is None else y + bias
        if self.inputs is not None and late:
            x = self.inputs(x)
        return nn.functional.linear(x, self.dequantize(x.dtype), bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.scheme}"


class QuantEmbedding(QuantWeight):
    """Rows of ``W_hat [V, D]``, decoded as they are looked up."""

    def __init__(
        self,
        scheme: WeightScheme,
        num: int,
        dim: int,
        padding_idx: int | None = None,
        tensors: dict[str, Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(scheme, (num, dim), tensors, dtype)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num, dim, padding_idx

    def forward(self, index: Tensor) -> Tensor:
        if self._kept is not None and self._kept.dtype == self.dtype:
            return self._kept[index]
        if (table := self.packed_rows()) is not None:
            return table.rows(index.reshape(-1), self.dtype).view(*index.shape, self.embedding_dim)
        held = self.qtensor()
        if not isinstance(self.scheme, Scheme) or self.scheme.blocks.height != 1:  # rows share what they are stored as: decode all
            return held.dequantize(self.dtype)[index]
        rows, inverse = torch.unique(index, return_inverse=True)
        return held.rows(rows).dequantize(self.dtype)[inverse]

    def packed_rows(self) -> PackedMatrix | None:
        """What decodes a row by itself, on the CPU in float32 and bfloat16; None where there is none."""
        kind = self.cpu_kind
        if kind is None or not self.multiplies_codes or self.dtype not in (torch.float32, torch.bfloat16):
            return None
        product = self.multiplier(kind)
        return product if isinstance(product, PackedMatrix) else None


class SharedLinear(nn.Module):
    """``y = x E^T + b`` with the matrix ``E [V, D]`` of a `QuantEmbedding`, which is stored there only."""

    def __init__(self, embedding: QuantEmbedding, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = embedding.shape
        self._owner = (embedding,)  # in a tuple, so that its tensors are not listed here too
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def embedding(self) -> QuantEmbedding:
        return self._owner[0]

    @property
    def weight(self) -> Tensor:
        return self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if (y := self.embedding.product(x)) is not None:
            return y if bias is None else y + bias
        return nn.functional.linear(x, self.embedding.dequantize(x.dtype), bias)


def share(model: nn.Module, tied: Mapping[str, str] | None = None) -> None:
    """Let heads (and embeddings) read the quantized embeddings that they are tied to: those of ``tied`` (alias -> owner) and those that transformers
    knows, which forgets them: there is no parameter left to tie. Call it after quantized modules are in place, before weights are tied or loaded."""
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    for alias, owner in [*(tied or {}).items(), *ties.items()]:
        path, _, leaf = alias.rpartition(".")
        embedding = model.get_submodule(owner.rpartition(".")[0])
        if not isinstance(embedding, QuantEmbedding) or leaf != "weight":
            continue
        head = model.get_submodule(path)
        parent, _, name = path.rpartition(".")
        if isinstance(head, nn.Embedding):
            setattr(model.get_submodule(parent), name, embedding)
        elif not isinstance(head, SharedLinear):
            bias = getattr(head, "bias", None)
            setattr(model.get_submodule(parent), name, SharedLinear(embedding, None if bias is None else bias.detach()))
        ties.pop(alias, None)


def as_stored(matrix: Tensor, shape: Sequence[int], *, swapped: bool) -> Tensor:
    """A decoded matrix (all rows of a stack of experts one after the other) in the shape in which its parameter is stored."""
    if swapped:
        return matrix.reshape(*shape[:-2], shape[-1], shape[-2]).mT
    return matrix.reshape(tuple(shape))


def attach(module: nn.Module, name: str, weight: QuantWeight, shape: tuple[int, ...], *, swapped: bool = False) -> None:
    """Make ``module.name`` a parameter that is decoded from ``weight`` whenever it is read, in the type the parameter had.

    The stored tensors live in a child module ``{name}_quantized``; the module's class becomes a subclass with a property.
    ``swapped``: the parameter stores the matrix transposed, ``[..., I, O]``. Raises ValueError where there is no such parameter.
    """
    original = module._parameters.pop(name, None)
    if original is None:
        raise ValueError(f"{type(module).__name__} has no parameter {name!r}")
    weight.dtype = original.dtype
    child = f"{name}_quantized"
    module.add_module(child, weight)

    def read(self: nn.Module) -> Tensor:
        held = self._modules[child]
        assert isinstance(held, QuantWeight)
        return as_stored(held.weight, shape, swapped=swapped)

    owner = type(module)
    module.__class__ = type(
        f"Quantized{owner.__name__}", (owner,), {name: property(read), "__module__": owner.__module__}
    )
