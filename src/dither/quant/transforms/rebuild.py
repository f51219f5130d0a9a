"""A model's weights as differentiable functions of rotations and scalings: the same rewrites as `transforms.rotate` folds, done anew each step.

The student holds the weights of the float model with norms folded, in the compute type. Whenever a block runs, its parameters are rebuilt from
them in the order of the fold (scalings between weights, the stream's rotation, the heads', scalings of norms, turns W <- W H) and put in place
of the stored ones for that call (`torch.func.functional_call`). Embeddings and heads outside the blocks are long, so the rotation is
moved to their other side, E[i] R and (x R^T) W_head^T. Cost of a rebuild: 2 D multiply-adds for each weight that touches the stream, as much as 2 D
tokens through it would; memory: the rebuilt weights of all blocks, or of one where activations are recomputed (``recompute``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from dither.formats import Scheme
from dither.graph import Consumer, HeadRotation, KeyScaling, Layer, Producer, Residual, Weight
from dither.graph.fold import column_view
from dither.graph.structure import matrix_view
from dither.quant.straight import clip_ratios, straight_rows, straight_weight
from dither.quant.transforms.rotate import Plan
from dither.special import apply_hadamard

Values = Mapping[str, Tensor]  # rotations and scalings by key: "stream:0", "heads:KEY", "scale:KEY", "keys:KEY"
Step = Callable[[Tensor, Values], Tensor]


class Student:
    """``model`` (norms folded, compute type, no gradients) under ``plan``. Off, it is the float model: the teacher.

    ``scheme``: what weights are rounded to while it is on (None: they stay float). ``recompute``: keep only each block's inputs for the backward
    pass.
    """

    def __init__(self, model: nn.Module, plan: Plan, inputs: Callable[[str], Scheme | None], scheme: Scheme | None, *, recompute: bool) -> None:
        self.model, self.plan, self.scheme, self.recompute = model, plan, scheme, recompute
        self.on = False
        self.values: Values = {}
        self.steps: dict[str, list[Step]] = {}
        self.blocks = [b.name for b in plan.whole.blocks]
        self.ratios: dict[str, Tensor] = {}
        self.read: tuple[Tensor, Any, Tensor] | None = None  # the last input that a layer read, how, and what became of it: others may read it too
        self._collect()
        self.weights = {f"{self._block(n)}.{layer.parameter}": layer for n, layer in plan.layers.items()}
        for name in plan.layers:
            self._round_inputs(name, inputs(name))
        for name in self.blocks:
            self._rebuild_in_place(name)
        self.outside = [n for n in self.steps if self._block(n) is None]

    def _block(self, name: str) -> str | None:
        return next((b for b in self.blocks if name.startswith(f"{b}.")), None)

    def __call__(self, batch: Mapping[str, Any], values: Values) -> Tensor:
        """Logits of the rewritten, rounded model."""
        with self._values(values):
            narrow = _Narrow(values, self.model)
            weights = {n: self._built(n, narrow) for n in self.outside}
            return logits(functional_call(self.model, weights, (), dict(batch)))

    def teacher(self, batch: Mapping[str, Any]) -> Tensor:
        """Logits of the float model."""
        with torch.no_grad():
            return logits(self.model(**batch))

    @contextmanager
    def _values(self, values: Values) -> Iterator[None]:
        self.on, self.values = True, values
        try:
            yield
        finally:
            self.on, self.read = False, None

    # -- what is done to each parameter, in the order of the fold -------------------------------------------------------

    def _collect(self) -> None:
        plan = self.plan
        self._scalings(rotated=False)
        for key, scaling in plan.keys.items():
            self._keys(key, scaling)
        for i, stream in enumerate(plan.whole.residuals):
            self._stream(f"stream:{i}", stream)
        for key, rotation in plan.heads.items():
            self._heads(key, rotation)
        self._scalings(rotated=True)
        for name, order in plan.turns.items():
            layer = plan.layers[name]
            self._add(f"{name.removesuffix(layer.name)}{layer.parameter}", _turned(layer, order))

    def _add(self, parameter: str, step: Step) -> None:
        self.steps.setdefault(parameter, []).append(step)

    def _scalings(self, *, rotated: bool) -> None:
        for key, scale in self.plan.scales.items():
            if scale.rotated == rotated:
                block, producer = key.rpartition(":")[0], scale.site.producer
                self._add(f"{block}.{producer.parameter}", _scaled_rows(producer, f"scale:{key}"))
                if producer.bias is not None:
                    self._add(f"{block}.{producer.bias}", _scaled_bias(producer, f"scale:{key}"))
                for consumer in scale.site.consumers:
                    self._add(f"{block}.{consumer.parameter}", _scaled_columns(consumer, f"scale:{key}"))

    def _keys(self, key: str, scaling: KeyScaling) -> None:
        block = key.rpartition(":")[0]
        for layer, factors in ((scaling.keys, scaling.of_keys), (scaling.queries, scaling.of_queries)):
            self._add(f"{block}.{layer.parameter}", _multiplied(layer, factors, f"keys:{key}"))
            if layer.bias is not None:
                self._add(f"{block}.{layer.bias}", _multiplied(None, factors, f"keys:{key}"))

    def _stream(self, key: str, stream: Residual) -> None:
        for norm in stream.norms:
            if norm.producer.bias is not None:
                self._add(norm.producer.bias, _written(Weight(norm.producer.bias, "table"), key))
        for writer in stream.writers:
            owner = self._owner(writer)
            if isinstance(owner, nn.Embedding):
                owner.register_forward_hook(self._rotate_output(key))
            else:
                self._add(writer.parameter, _written(writer, key))
        for reader in stream.readers:
            owner = self._owner(reader)
            if isinstance(owner, nn.Linear):
                owner.register_forward_pre_hook(self._rotate_back(key))
            else:
                self._add(reader.parameter, _read(reader, key))

    def _owner(self, weight: Weight) -> nn.Module | None:
        """The module that holds a parameter outside of all blocks."""
        return None if self._block(weight.parameter) else self.model.get_submodule(weight.parameter.rpartition(".")[0])

    def _heads(self, key: str, rotation: HeadRotation) -> None:
        block, producer = key.rpartition(":")[0], rotation.site.producer
        self._add(f"{block}.{producer.parameter}", _turned_rows(producer, f"heads:{key}"))
        if producer.bias is not None:
            self._add(f"{block}.{producer.bias}", _turned_bias(producer, f"heads:{key}"))
        for consumer in rotation.site.consumers:
            self._add(f"{block}.{consumer.parameter}", _turned_columns(consumer, rotation.heads_of(consumer), f"heads:{key}"))

    # -- hooks ------------------------------------------------------------------------------------------------------------

    def _rotate_output(self, key: str) -> Callable[..., Tensor | None]:
        return lambda module, args, out: out @ self.values[key].to(out.dtype) if self.on else None

    def _rotate_back(self, key: str) -> Callable[..., Any]:
        return lambda module, args: (args[0] @ self.values[key].to(args[0].dtype).mT, *args[1:]) if self.on else None

    def _round_inputs(self, name: str, scheme: Scheme | None) -> None:
        order = self.plan.turns.get(name)

        def before(module: nn.Module, args: tuple[Any, ...]) -> Any:
            if not self.on:
                return None
            if self.read is None or self.read[0] is not args[0] or self.read[1] != (order, scheme):
                x = args[0] if order is None else apply_hadamard(args[0], order)
                self.read = args[0], (order, scheme), x if scheme is None else straight_rows(x, scheme)
            return (self.read[2], *args[1:])

        self.model.get_submodule(name).register_forward_pre_hook(before)

    def _rebuild_in_place(self, name: str) -> None:
        block = self.model.get_submodule(name)
        held = _Held(block)
        own = [n for n in dict.fromkeys([*self.steps, *(self.weights if self.scheme is not None else ())]) if n.startswith(f"{name}.")]

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not self.on:
                return held(*args, **kwargs)
            values = self.values  # a recomputation comes when the student may be off, or on with others

            def rebuilt(*args: Any) -> Any:
                before, self.on = self.on, True
                try:
                    mine = _Narrow(values, held)
                    weights = {f"block.{n[len(name) + 1 :]}": self._built(n, mine) for n in own}
                    return functional_call(held, weights, args, kwargs)
                finally:
                    self.on = before

            return checkpoint(rebuilt, *args, use_reentrant=False, preserve_rng_state=False) if self.recompute else rebuilt(*args)

        block.__dict__["forward"] = forward

    def _built(self, name: str, values: Values) -> Tensor:
        tensor = self.model.get_parameter(name).detach()
        for step in self.steps.get(name, ()):
            tensor = step(tensor, values)
        if self.scheme is not None and name in self.weights:
            matrix = matrix_view(tensor, self.weights[name].kind, self.weights[name].swapped)
            flat = matrix.reshape(-1, matrix.shape[-1])
            if name not in self.ratios:  # once: searching at every step would take longer than the step
                self.ratios[name] = clip_ratios(flat.detach(), self.scheme)
            tensor = _stored(straight_weight(flat, self.scheme, self.ratios[name]).view(matrix.shape), tensor, self.weights[name])
        return tensor


class _Held(nn.Module):
    """A block whose own ``forward`` is called, whatever stands in its place."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.block).forward(self.block, *args, **kwargs)


class _Narrow(dict[str, Tensor]):
    """Values in the block's own type, each converted once a block: gradients are then summed over blocks in the wide type."""

    def __init__(self, wide: Values, module: nn.Module) -> None:
        super().__init__()
        self.wide, self.dtype = wide, next(p.dtype for p in module.parameters() if p.is_floating_point())

    def __missing__(self, key: str) -> Tensor:
        self[key] = value = self.wide[key].to(self.dtype)
        return value


def logits(output: Any) -> Tensor:
    """The logits in what a model returned: its ``logits``, or the tensor itself."""
    found = getattr(output, "logits", output)
    if not isinstance(found, Tensor):
        raise TypeError(f"the model returns {type(output).__name__}, which has no logits to learn from")
    return found


# -- steps ----------------------------------------------------------------------------------------------------------------


def _stored(matrix: Tensor, like: Tensor, weight: Weight | Layer | Consumer | Producer) -> Tensor:
    """A matrix as its parameter stores it: the inverse of `matrix_view`."""
    return matrix.reshape(like.shape) if weight.kind == "conv" or not weight.swapped else matrix.mT


def _factors(producer: Producer, scale: Tensor) -> Tensor:
    """``[O]``: 1 / S at the producer's rows, else 1."""
    return scale.new_ones(producer.outputs).index_copy(0, producer.rows.to(scale.device), 1 / scale)


def _scaled_rows(producer: Producer, key: str) -> Step:
    def step(weight: Tensor, values: Values) -> Tensor:
        factor = _factors(producer, values[key])
        if producer.is_vector:
            return (weight + producer.offset) * factor.view(weight.shape) - producer.offset
        matrix = matrix_view(weight, producer.kind, producer.swapped)
        return _stored(matrix * factor.view(*matrix.shape[:-1], 1), weight, producer)

    return step


def _scaled_bias(producer: Producer, key: str) -> Step:
    return lambda bias, values: bias * _factors(producer, values[key]).view(bias.shape)


def _scaled_columns(consumer: Consumer, key: str) -> Step:
    def step(weight: Tensor, values: Values) -> Tensor:
        columns = column_view(weight, consumer)  # [S, O, I, k]
        scaled = columns * consumer.expand(values[key]).view(columns.shape[0], 1, columns.shape[2], 1)
        if consumer.kind == "conv":
            return scaled.reshape(weight.shape)
        matrix = scaled[..., 0] if consumer.kind == "experts" else scaled[0, ..., 0]
        return _stored(matrix, weight, consumer)

    return step


def _multiplied(layer: Layer | None, factors: Callable[[Tensor], Tensor], key: str) -> Step:
    """Rows of a layer's weight times their factors; of its bias where ``layer`` is None."""

    def step(weight: Tensor, values: Values) -> Tensor:
        if layer is None:
            return weight * factors(values[key])
        return _stored(matrix_view(weight, layer.kind, layer.swapped) * factors(values[key]).view(-1, 1), weight, layer)

    return step


def _read(weight: Weight, key: str) -> Step:
    return lambda w, values: _stored(matrix_view(w, weight.kind, weight.swapped) @ values[key], w, weight)


def _written(weight: Weight, key: str) -> Step:
    if weight.kind == "table":
        return lambda w, values: w @ values[key]
    return lambda w, values: _stored(values[key].mT @ matrix_view(w, weight.kind, weight.swapped), w, weight)


def _turned_rows(producer: Producer, key: str) -> Step:
    def step(weight: Tensor, values: Values) -> Tensor:
        matrix, r, rows = matrix_view(weight, producer.kind, producer.swapped), values[key], producer.rows
        turned = r.mT @ matrix[rows].view(r.shape[0], r.shape[1], -1)  # [G, d, I]
        return _stored(matrix.index_copy(0, rows, turned.reshape(len(rows), -1)), weight, producer)

    return step


def _turned_bias(producer: Producer, key: str) -> Step:
    def step(bias: Tensor, values: Values) -> Tensor:
        r, rows = values[key], producer.rows
        turned = r.mT @ bias.reshape(-1)[rows].view(r.shape[0], r.shape[1], 1)
        return bias.reshape(-1).index_copy(0, rows, turned.reshape(-1)).view(bias.shape)

    return step


def _turned_columns(consumer: Consumer, heads: Tensor, key: str) -> Step:
    def step(weight: Tensor, values: Values) -> Tensor:
        matrix, r = matrix_view(weight, consumer.kind, consumer.swapped), values[key]
        runs = matrix.reshape(len(matrix), len(heads), -1).transpose(0, 1)  # [H, O, d]
        turned = torch.where((heads >= 0)[:, None, None], runs @ r[heads.clamp(min=0)], runs)
        return _stored(turned.transpose(0, 1).flatten(1), weight, consumer)

    return step


def _turned(layer: Layer, order: int) -> Step:
    return lambda w, values: _stored(apply_hadamard(matrix_view(w, layer.kind, layer.swapped), order), w, layer)
