"""Who reads what: every product of an activation with a parameter, seen while the module runs.

`Trace` watches torch functions (linear, matmul, addmm, conv, ...) and recognises a parameter by the memory that the operand
lives in, so functional uses, transposed storage and single slices of an expert stack are all seen, without a module's name.

While it watches it also *cuts*: what goes into a product is detached, so that everything downstream depends on the product's output
``y`` only. That output is returned as ``y * m + bias + d`` with one ``m`` and one ``d`` for each output channel, leaves of the
autograd graph. One backward pass from a reader's input then tells for all channels of all weights at once how that input
depends on them *without passing through another weight* (see `probe`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dither.graph.exact import Args, Exact, Kwargs
from dither.graph.tree import map_tensors


@dataclass(frozen=True)
class View:
    """Which part of a parameter an operand is: rows ``row .. row + out`` (outputs), columns ``col .. col + inp`` (inputs)."""

    name: str
    swapped: bool
    row: int
    col: int
    out: int
    inp: int
    outputs: int  # of the whole parameter: rows in one expert
    inputs: int
    experts: int  # 1 for a plain matrix
    expert: int | None  # None: all of them, batched
    groups: int = 1
    pads: bool = False  # a convolution that puts zeros around what it reads


@dataclass(eq=False)
class Read:
    """One product. ``x``: what was read, channels last ``[..., I]`` (with its autograd history); ``y``: the bare product."""

    view: View
    x: Tensor
    source: tuple[int, ...]  # identifies the memory that was read
    y: Tensor


@dataclass(eq=False)
class Leaves:
    """The multipliers and offsets of one parameter's output channels, ``[E * O]`` each; and a matrix ``[O, O]`` to mix them by."""

    scale: Tensor
    shift: Tensor
    mix: Tensor | None = None


class Parameters:
    """The matrices of a module, found by the memory they occupy."""

    def __init__(self, module: nn.Module) -> None:
        self.by_memory: dict[int, tuple[str, nn.Parameter]] = {}
        self.vectors: dict[int, str] = {}
        for name, p in module.named_parameters():
            if p.numel() == 0 or not p.is_floating_point():
                continue
            memory = p.untyped_storage().data_ptr()
            if p.dim() >= 2:
                self.by_memory[memory] = (name, p)
            if p.numel() == max(p.shape, default=1) or p.dim() == 2:
                self.vectors[memory] = name

    def find(self, t: Any) -> tuple[str, nn.Parameter] | None:
        if not isinstance(t, Tensor) or t.dim() < 2:
            return None
        try:
            return self.by_memory.get(t.untyped_storage().data_ptr())
        except (RuntimeError, NotImplementedError):  # a tensor without memory, inside vmap
            return None

    def locate(self, weight: Tensor) -> View | None:
        """``weight``: an operand oriented as ``[O, I]`` or ``[E, O, I]``. None where it is not such a part of a parameter."""
        found = self.find(weight)
        if found is None:
            return None
        name, p = found
        start = int(weight.storage_offset()) - int(p.storage_offset())
        if p.dim() > 3 or weight.dim() > p.dim():
            return None
        rows, cols = p.shape[-2:]  # as stored
        expert, offset = divmod(start, rows * cols)
        first, second = divmod(offset, cols)
        out, inp = weight.shape[-2:]
        out_step, in_step = weight.stride()[-2:]
        whole = weight.dim() == 3
        if whole and (weight.shape[0] != p.shape[0] or weight.stride(0) != rows * cols or expert != 0):
            return None
        which = None if whole else expert
        experts = p.shape[0] if p.dim() == 3 else 1
        if (in_step == 1 or inp == 1) and (out_step == cols or out == 1) and second + inp <= cols:
            return View(name, False, first, second, out, inp, rows, cols, experts, which)
        if (out_step == 1 or out == 1) and (in_step == cols or inp == 1) and second + out <= cols:
            return View(name, True, second, first, out, inp, cols, rows, experts, which)
        return None


@dataclass(eq=False)
class Product:
    """A recognised product: run ``bare(x)`` to get y without bias."""

    view: View
    x: Tensor
    x_dim: int
    y_dim: int
    bare: Callable[[Tensor], Tensor]
    bias: Tensor | None = None


def _unchecked(func: FunctionType) -> FunctionType:
    """A function of torch that runs its body at once, where the original would first offer itself to the active mode again."""
    names = {n: (lambda *_: False) for n in func.__code__.co_names if n.startswith("has_torch_function")}
    body = FunctionType(func.__code__, func.__globals__ | names, func.__name__, func.__defaults__, func.__closure__)
    body.__kwdefaults__ = func.__kwdefaults__
    return body


_MATMUL = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm}
_ADDMM = {torch.addmm, Tensor.addmm, torch.baddbmm, Tensor.baddbmm}
_CONV = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3, torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}
_RANK = {torch.topk, Tensor.topk, torch.argmax, Tensor.argmax, torch.sort, Tensor.sort, torch.argsort, Tensor.argsort}
_SOFTMAX = {F.softmax, torch.softmax, Tensor.softmax}


def recognise(func: Callable[..., Any], args: Args, kwargs: Kwargs, parameters: Parameters) -> Product | None:
    """The product with a parameter that this call computes, or None."""
    if func is F.linear:
        x, w = args[0], args[1] if len(args) > 1 else kwargs["weight"]
        bias = args[2] if len(args) > 2 else kwargs.get("bias")
        view = parameters.locate(w) if w.dim() == 2 else None
        return None if view is None else Product(view, x, -1, -1, lambda t: F.linear(t, w), bias)
    if func in _MATMUL or func is Tensor.__rmatmul__:
        pair = (*args, *kwargs.values())
        a, b = pair if func is not Tensor.__rmatmul__ else pair[::-1]
        return _matmul(a, b, None, parameters)
    if func in _ADDMM and not kwargs and len(args) == 3:
        return _matmul(args[1], args[2], args[0], parameters)
    if func in _CONV:
        return _conv(func, args, kwargs, parameters)
    return None


def _matmul(a: Any, b: Any, bias: Tensor | None, parameters: Parameters) -> Product | None:
    right, left = parameters.find(b) is not None, parameters.find(a) is not None
    if right == left:
        return None
    if right:
        view = parameters.locate(b.mT)
        return None if view is None else Product(view, a, -1, -1, lambda t: torch.matmul(t, b), bias)
    view = parameters.locate(a)
    if view is None or (bias is not None) or b.dim() < 2:
        return None
    return Product(view, b, -2, -2, lambda t: torch.matmul(a, t))


def _conv(func: Callable[..., Any], args: Args, kwargs: Kwargs, parameters: Parameters) -> Product | None:
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = dict(zip(names, args, strict=False)) | kwargs
    w, x = given["weight"], given["input"]
    found = parameters.find(w)
    if found is None or found[1].shape != w.shape or w.storage_offset() != found[1].storage_offset():
        return None
    groups, dim = int(given.get("groups", 1)), -_CONV[func] - 1
    out, inp = w.shape[0], w.shape[1] * groups
    padding = given.get("padding", 0)
    pads = padding != "valid" and any(p != 0 for p in (padding if isinstance(padding, tuple | list) else (padding,)))
    view = View(found[0], False, 0, 0, out, inp, out, inp, 1, 0, groups, pads)
    rest = {k: given[k] for k in names[3:] if k in given}
    return Product(view, x, dim, dim, lambda t: func(t, w, **rest), given.get("bias"))


@dataclass(eq=False)
class Seen:
    """What one watched run left behind. ``ranked``, ``logits``: inputs of top-k and of softmax; ``outputs``: what was returned."""

    reads: list[Read] = field(default_factory=list)
    ranked: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    tables: set[str] = field(default_factory=set)  # parameters used as embedding tables
    biases: dict[str, str] = field(default_factory=dict)  # weight -> the bias that was added in the same call
    cuts: list[Tensor] = field(default_factory=list)  # what cut modules returned


class Trace(Exact):
    """Watch a run. With ``replay``, reads return what they returned in that earlier run, so that a change of a producer reaches
    the inputs of its direct readers and nothing behind them (and no product is computed twice)."""

    def __init__(
        self, parameters: Parameters, leaves: dict[str, Leaves], *, grad: bool = False, replay: Seen | None = None
    ) -> None:
        super().__init__()
        self.parameters, self.leaves, self.grad, self.replay = parameters, leaves, grad, replay
        self.seen = Seen()
        self.held: list[Tensor] = []

    def handle(self, func: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
        if func in _RANK and isinstance(args[0], Tensor) and args[0].is_floating_point():
            self.seen.ranked.append(args[0])
        elif func in _SOFTMAX:
            self.seen.logits.append(args[0] if args else kwargs["input"])
        elif func is F.scaled_dot_product_attention:
            given = dict(zip(("query", "key"), args, strict=False)) | kwargs
            self.seen.logits += [given["query"], given["key"]]
        elif func is F.embedding or func is torch.embedding:
            operands = map(self.parameters.find, (*args, *kwargs.values()))
            found = next((f for f in operands if f is not None), None)
            if found is not None:
                self.seen.tables.add(found[0])
        if isinstance(func, FunctionType) and any(self.parameters.find(a) for a in (*args, *kwargs.values())):
            with self:  # written in Python: look inside
                return _unchecked(func)(*args, **kwargs)
        product = recognise(func, args, kwargs, self.parameters)
        return func(*args, **kwargs) if product is None else self._read(product)

    def _read(self, product: Product) -> Tensor:
        view, source = product.view, product.x
        if self.replay is None:
            with torch.no_grad():
                y = product.bare(source.detach())
        else:
            earlier = self.replay.reads[len(self.seen.reads)]
            if earlier.view != view:
                raise RuntimeError(
                    f"two runs on the same input read {earlier.view.name} and {view.name} at the same point"
                )
            y = earlier.y
        identity = (
            source.untyped_storage().data_ptr(),
            int(source.storage_offset()),
            source.shape[product.x_dim],
            source.numel(),
        )
        self.held.append(source)  # keeps the memory's address from being used again
        self.seen.reads.append(Read(view, source.movedim(product.x_dim, -1).clone(), identity, y))
        leaves = self.leaves_of(view)
        out = y.clone()  # what is returned may be changed in place; what is kept may not
        if leaves is not None and leaves.mix is not None:
            out = (out.movedim(product.y_dim, -1) @ leaves.mix).movedim(-1, product.y_dim)
        if leaves is not None:
            out = out * self._channels(leaves.scale, view, product.y_dim)
        if product.bias is not None:
            b = product.bias
            name = self.parameters.vectors.get(b.untyped_storage().data_ptr())
            if name is not None:
                self.seen.biases[view.name] = name
            out = out + (b.reshape(-1, *[1] * (-product.y_dim - 1)) if b.dim() == 1 else b)
        if leaves is not None:
            out = out + self._channels(leaves.shift, view, product.y_dim)
        return out

    def cut(self, output: Any) -> Any:
        """Record what a module returned and hand on the same values without their history."""

        def hand_on(t: Tensor) -> Tensor:
            if not t.is_floating_point():
                return t
            earlier = t if self.replay is None else self.replay.cuts[len(self.seen.cuts)]
            self.seen.cuts.append(t)
            return earlier.detach()

        return map_tensors(output, hand_on)

    def leaves_of(self, view: View) -> Leaves | None:
        if self.grad and view.name not in self.leaves:
            size = view.experts * view.outputs
            self.leaves[view.name] = Leaves(torch.ones(size, requires_grad=True), torch.zeros(size, requires_grad=True))
        return self.leaves.get(view.name)

    @staticmethod
    def _channels(values: Tensor, view: View, dim: int) -> Tensor:
        """The entries of ``values [E * O]`` that belong to ``view``, shaped to broadcast against y with channels at ``dim``."""
        table = values.view(view.experts, view.outputs)[:, view.row : view.row + view.out]
        if view.expert is None:
            return table[:, None, :] if dim == -1 else table[:, :, None]
        return table[view.expert].view(-1, *[1] * (-dim - 1))
