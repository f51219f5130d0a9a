"""Sees what torch does for one token, and writes it down (`instructions`).

What depends on weights alone is a number by then. Layers that multiply weights, tables that are looked up and attention are told of by `recording`;
everything else comes as operations of torch. What is none of `OPERATIONS` is written as `Unknown`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dither.kernels import PackedMatrix
from dither.quant.cpu_products import RoundedProduct
from dither.quant.linear import QuantWeight, SharedLinear
from dither.quant.program.instructions import (
    Attend,
    Elementwise,
    Instruction,
    Matrix,
    Multiply,
    Record,
    Unknown,
    Unrecordable,
    reads,
    storage,
)
from dither.quant.program.operations import DONE, OPERATIONS


class Recorder(TorchDispatchMode):
    """Writes to ``record`` while it is entered. ``depends``: the storages whose values differ from token to token."""

    def __init__(self, ids: Tensor, place: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.record = Record(place=place)
        self.ids = ids
        self.depends = {storage(ids), storage(place)}
        self.silent = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would load its compiler, which takes a second, to keep it away from what is never compiled

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        output = func(*args, **options)
        if self.silent:
            return output
        given = [x for x in tree_leaves((args, options)) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(output) if isinstance(x, Tensor)]
        self.record.held += made
        live = [x for x in given if self._differs(x)]
        if not live:
            if not made and given:
                raise Unrecordable(f"{func}: its values are looked at")
            return output
        name = func.overloadpacket.__name__
        if not made:
            raise Unrecordable(f"{name}: the model looks at its values")
        if func._schema.is_mutable:
            raise Unrecordable(f"{name}: writes into a tensor")
        known = {storage(x) for x in given}
        fresh = [x for x in made if storage(x) not in known and x.numel()]
        if not fresh:
            return output
        start = len(self.record.instructions)
        try:
            if name not in OPERATIONS:
                raise Unrecordable(name)
            OPERATIONS[name](self, fresh[0], args, options)
            self._unknown(f"a second result of {name}", live, fresh[1:])
        except Unrecordable as why:
            del self.record.instructions[start:]
            self._unknown(str(why), live, fresh)
        self.depends |= {storage(x) for x in fresh}
        return output

    def _differs(self, x: Tensor) -> bool:
        return storage(x) in self.depends

    def _unknown(self, why: str, x: Sequence[Tensor], made: Sequence[Tensor]) -> None:
        self.record.instructions += [Unknown(why, tuple(x), y) for y in made]

    @contextmanager
    def silently(self) -> Iterator[None]:
        self.silent += 1
        try:
            yield
        finally:
            self.silent -= 1

    def elementwise(self, function: str, y: Tensor, a: Tensor, b: Any = None) -> None:
        self.made(y)
        number = float(b) if b is not None and not isinstance(b, Tensor) else b
        self.record.instructions.append(Elementwise(function, y, a, number))

    def done(self, function: str, a: Tensor, *b: Any) -> Tensor:
        """The function in float32, done now and written down."""
        y = DONE[function](a.float(), *(x.float() if isinstance(x, Tensor) else x for x in b))
        self.elementwise(function, y, a, *b)
        return y

    def made(self, *tensors: Tensor) -> None:
        self.record.held += tensors
        self.depends |= {storage(x) for x in tensors}

    def linear(self, module: nn.Module, forward: Callable[..., Tensor], x: Tensor) -> Tensor:
        """A layer that multiplies weights."""
        with self.silently():
            y = forward(x)
        if not self._differs(x):
            return y
        weight, bias = _weight(module), getattr(module, "bias", None)
        if x.numel() != x.shape[-1]:
            raise Unrecordable("a layer that reads more than one row")
        if bias is None:
            self.record.instructions.append(Multiply(x, weight, y))
        else:  # few-bit layers round twice, as they do in torch; others once
            with self.silently():
                row = x.reshape(1, -1)
                product = nn.functional.linear(row.float(), weight.float()) if isinstance(weight, Tensor) else weight(row)
                product = product.view(y.shape)
            self.made(product)
            self.record.instructions += [Multiply(x, weight, product), Elementwise("add", y, product, bias)]
        self.made(x, y)
        return y

    def lookup(self, module: nn.Module, forward: Callable[..., Tensor], index: Tensor) -> Tensor:
        """A table that a token's id or place is looked up in."""
        with self.silently():
            y = forward(index)
        names = {storage(self.ids): "id", storage(self.record.place): "place"}
        if index.numel() != 1 or storage(index) not in names:
            raise Unrecordable("a table that is looked up by something else than the token's id or place")
        self.record.lookups.append((module, names[storage(index)], y))
        self.made(y)
        return y

    def attention(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """``query [1, H, 1, d]``, ``key`` and ``value`` ``[1, G, 1, d]`` -> ``[1, 1, H, e]``: over one token it is the value."""
        with self.silently():
            shared = query.shape[1] // value.shape[1]
            y = value.repeat_interleave(shared, 1).transpose(1, 2).contiguous()
        q, k, v = (x[0, :, 0] for x in (query, key, value))
        self.made(q, k, v, y)
        self.record.instructions.append(Attend(layer, q, k, v, y[0, 0], scale))
        return y


def _weight(module: nn.Module) -> Matrix:
    if isinstance(module, nn.Linear):
        return module.weight.detach()
    held = module.embedding if isinstance(module, SharedLinear) else module
    assert isinstance(held, QuantWeight)
    kind = held.cpu_kind
    if kind is not None and held.multiplies_codes and (kind.rounds or held.rounding is None):
        product = held.multiplier(kind)
        if isinstance(product, RoundedProduct):
            return product.matrix
        if isinstance(product, PackedMatrix):
            return product
    raise Unrecordable("a few-bit layer whose codes are not multiplied as they are")


def live(recorder: Recorder) -> Record:
    """Only what the scores depend on. Raises Unrecordable where that is unknown."""
    found, needed, kept = recorder.record, {storage(recorder.record.logits)}, list[Instruction]()
    for instruction in reversed(found.instructions):
        if storage(instruction.y) not in needed:
            continue
        if isinstance(instruction, Unknown):
            raise Unrecordable(instruction.why)
        needed |= {storage(x) for x in reads(instruction)}
        kept.append(instruction)
    if storage(recorder.ids) in needed:
        raise Unrecordable("the token's id is computed with")
    found.instructions = kept[::-1]
    return found
