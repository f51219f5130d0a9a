"""The layers of one block: each gets its grid and its codes, and a place in the finished unit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dither.formats import Params, Scheme
from dither.graph import Layer
from dither.graph.structure import absolute
from dither.quant.context import Context
from dither.quant.inputs import InputQuant
from dither.quant.outcome import LayerReport
from dither.quant.parts import BlockView, Rounded, Task
from dither.quant.slices import Slices, is_separable, slice_count
from dither.quant.statistics import Statistics
from dither.quant.unit import Unit


class LayerWork:
    """``unit`` collects what becomes of the layers that ``view`` shows."""

    def __init__(self, context: Context, view: BlockView, unit: Unit) -> None:
        self.context, self.recipe, self.view, self.unit = context, context.recipe, view, unit

    def is_done(self, layer: Layer) -> bool:
        return absolute(layer.parameter, self.unit.name) in self.unit.replaced

    def together(self, names: Sequence[str], statistics: Statistics) -> list[tuple[Layer, Tensor]]:
        """Round layers that read one tensor; returns each with its decoded weight, as `record`."""
        layers = [self.view.structure.layer(n) for n in names]
        tasks = []
        for layer in layers:
            weight = layer.flat(self.view.module)
            tasks.append(Task(weight, self.view.schemes[layer.name], self.grid(layer, weight, statistics), layer.kind == "linear"))
        found = self.recipe.rounding.round_together(tasks, statistics)
        return [(layer, self.record(layer, rounded, statistics)) for layer, rounded in zip(layers, found, strict=True)]

    def alone(self, layer: Layer) -> Tensor:
        """Round a layer with what the float pass has seen of it, if anything; as `record`."""
        if (found := self.view.slices.get(layer.name)) is not None:
            slices = self.slices(layer)
            for k, seen in found.items():
                self.round_slice(layer, slices, k, seen)
            return self.joined(layer, slices)
        statistics = self.view.statistics.get(layer.name)
        decoded = self.record(layer, self._round(layer, layer.flat(self.view.module), statistics), statistics)
        row, scheme = self.unit.layers[-1], self.view.schemes[layer.name]
        if row.fallback is not None and slice_count(layer, self.view.module) > 1 and not is_separable(scheme):
            row.fallback += f" ({scheme} does not let its slices, which have inputs of their own, be rounded apart)"
        return decoded

    def grid(self, layer: Layer, weight: Tensor, statistics: Statistics | None) -> Params:
        """The grid of a layer's ``weight [O, I]``, or of a slice of it; empty where its scheme is none."""
        scheme = self.view.schemes[layer.name]
        if not isinstance(scheme, Scheme):
            return {}
        flat = self.recipe.rounding.aimed_at(weight, statistics)
        return scheme.fit(flat) if layer.name in self.view.spared else self.recipe.grid.fit(flat, scheme, statistics)

    def _round(self, layer: Layer, weight: Tensor, statistics: Statistics | None) -> Rounded:
        """What the rounding makes of a layer's ``weight [O, I]``, or of a slice of it."""
        scheme, rounding = self.view.schemes[layer.name], self.recipe.rounding
        grid = self.grid(layer, weight, statistics)
        if layer.kind == "linear" or statistics is None:
            return rounding.round(weight, scheme, grid, statistics)
        return rounding.round_together([Task(weight, scheme, grid, is_linear=False)], statistics)[0]

    # -- slices (`quant.slices`) ------------------------------------------------------------------------------------------

    def slices(self, layer: Layer) -> Slices:
        return Slices(layer.flat(self.view.module), self.view.schemes[layer.name], slice_count(layer, self.view.module))

    def round_slice(self, layer: Layer, slices: Slices, k: int, statistics: Statistics) -> Tensor:
        """Round slice k of a layer; returns its decoded values ``[O / slices, I]``."""
        return slices.put(k, self._round(layer, slices.weight[k], statistics), statistics)

    def joined(self, layer: Layer, slices: Slices) -> Tensor:
        """Record a layer whose slices were rounded apart (those nobody saw are now); as `record`."""
        decoded = self.record(layer, slices.joined(lambda weight: self._round(layer, weight, None)), None)
        self.unit.layers[-1].tokens, self.unit.layers[-1].output_error = slices.tokens, slices.output_error
        return decoded

    # -- the record ---------------------------------------------------------------------------------------------------------

    def record(self, layer: Layer, rounded: Rounded, statistics: Statistics | None) -> Tensor:
        """Put what a layer was rounded to into the unit; returns its decoded weight in the layer's matrix shape."""
        view, unit, name = self.view, self.unit, absolute(layer.name, self.unit.name)
        weight, decoded = layer.flat(view.module), rounded.tensor.dequantize(torch.float32)
        row = LayerReport(name, view.index, tuple(weight.shape), str(rounded.tensor.scheme), tokens=0 if statistics is None else statistics.tokens)
        row.loss, row.damp, row.fallback, row.facts = rounded.loss, rounded.damp, rounded.fallback, rounded.facts
        row.measure(weight, decoded, statistics, self.context.compute)
        is_linear = layer.kind == "linear"
        inputs = rounded.inputs or view.inputs.get(layer.name) or self.context.inputs.get(self.context.known_as(name))
        if inputs is None and self.recipe.inputs is not None:
            inputs = InputQuant(self.recipe.inputs)
        if inputs is not None and not is_linear:
            unit.notes.append(f"{name}: its input stays float, since it is no linear layer")
            inputs = None
        unit.add(
            absolute(layer.parameter, unit.name),
            "linear" if is_linear else "parameter",
            rounded.tensor,
            row,
            storage=layer.shape,
            swapped=layer.swapped,
            inputs=inputs,
            added_bias=is_linear and self._bias_is_new(layer, name),
        )
        return decoded.reshape(layer.matrix(view.module).shape)

    def _bias_is_new(self, layer: Layer, name: str) -> bool:
        """Whether a part gave the layer a bias, so that a model made from the configuration alone has none there."""
        has = getattr(self.view.module.get_submodule(layer.name), "bias", None) is not None
        return has and not self.context.is_original(f"{name}.bias")
