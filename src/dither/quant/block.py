"""One block of a model, from float to few bits:

    float pass      the float block on the float model's activations: statistics for transforms (only if the recipe asks)
    transforms      rewrites at the block's proved sites
    rounded pass    the block on the activations of the model as rounded so far, pausing at each place (`quant.slices`, `quant.walker`):
                    grid, rounding, and on through the rounded layer
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dither import graph, models
from dither.errors import UsageError
from dither.formats import WeightScheme
from dither.graph import Site, Structure
from dither.graph.structure import absolute
from dither.quant.assemble import restore
from dither.quant.context import Context
from dither.quant.layer_work import LayerWork
from dither.quant.outcome import Event, peak_memory
from dither.quant.parts import BlockRounding, BlockView
from dither.quant.slices import Place, Slices, gathered_bytes, places
from dither.quant.statistics import Statistics
from dither.quant.streams import Streams, float_pass, rounded_pass
from dither.quant.surroundings import check_attention
from dither.quant.unit import Unit
from dither.quant.walker import Call, run

MOST_OF_EXPERTS = 1 << 30  # bytes of a block's experts' statistics in the float pass; the rounded pass holds one expert's at a time


class BlockWork:
    """What is done to each block; remembers the structure of blocks of one shape."""

    def __init__(self, context: Context) -> None:
        self.context, self.recipe, self.compute = context, context.recipe, context.compute
        self.structures: dict[tuple[Any, ...], Structure] = {}

    def do(self, i: int, name: str, module: nn.Module, streams: Streams, probe: Call | None) -> Unit:
        """Block ``i``, called ``name``, whose ``module`` holds float32 weights. ``probe``: a call of a few tokens to prove structure with."""
        recipe, structure = self.recipe, self._structure(module, probe)
        if recipe.kv is not None and any(layer.feeds_logits and not layer.routes for layer in structure.layers):
            check_attention(module)
        unit = Unit(name)
        schemes = self._schemes(name, module, structure, unit.notes)
        at = places(structure, module, schemes)
        view = BlockView(
            i, name or "model", module, structure, {}, schemes, self.compute, {}, self.context.seed, samples=self.context.samples
        )
        title = view.name  # not ``view`` itself: a view that held itself would keep its activations until Python's collector runs
        view.say = lambda what: self.context.progress(Event(i, self.context.blocks, f"{title}: {what}", memory=peak_memory()))
        if recipe.grid.spare_attention:
            view.spared = structure.attention_logit_layers
        if recipe.uses_float_stream:
            self._float(view, at, streams)
            for transform in recipe.transforms:
                transform.apply(view)
            unit.sites += view.findings
            unit.notes += view.notes
            view.float_calls = []
            for attention, operands in view.attention.items():
                unit.attend(absolute(attention, name), operands)
        if recipe.uses_sites:
            unit.proved = [_site(name, site) for site in structure.sites]
            unit.unproved = [f"{absolute(n, name)}: {why}" for n, why in structure.unproved]
        self._settle(view, unit)

        work = LayerWork(self.context, view, unit)
        if isinstance(recipe.rounding, BlockRounding):
            self._reconstructed(work, streams, recipe.rounding)
        elif recipe.uses_rounded_stream:
            self._rounded(work, at, streams)
        elif recipe.rounding.needs:
            for names in structure.groups(schemes):
                if (statistics := view.statistics.get(names[0])) is not None:
                    work.together(names, statistics)
        for layer in structure.layers:
            if layer.name in schemes and not work.is_done(layer):
                work.alone(layer)
        for n, tensor in _state(module):
            full = absolute(n, name)
            if full not in unit.replaced and full not in self.context.source.tied:
                unit.keep(full, tensor.to(self.context.dtype_of(full)))
        return unit

    def pass_by(self, i: int, name: str, module: nn.Module, streams: Streams, unit: Unit) -> None:
        """Move the streams past a block that an earlier run finished."""
        source = self.context.source
        if streams.float is not None:
            source.fill(module, name, dtype=self.compute)
            streams.float = run(module, streams.calls(i, streams.float))
        if streams.rounded is not None:
            source.fill(module, name, dtype=torch.float32)
            restore(module, unit, name)
            streams.rounded = run(module.to(self.compute), streams.calls(i, streams.rounded))

    # -- the passes -------------------------------------------------------------------------------------------------------

    def _float(self, view: BlockView, at: Sequence[Place], streams: Streams) -> None:
        """Statistics, and the arguments of the modules that transforms search on, from the float model's activations."""
        recipe = self.recipe
        needs = frozenset().union(
            *(t.needs for t in recipe.transforms),
            () if recipe.rounding.needs and not recipe.rounds_on_float else recipe.rounding.needs | recipe.grid.needs,
        )
        at = self._affordable(view, at, needs)
        captured = {name for t in recipe.transforms for name in t.captures(view)}
        tokens = max((t.tokens for t in recipe.transforms), default=0)
        runner = copy.deepcopy(view.module).to(self.compute)
        calls = streams.calls(view.index, streams.float)
        if any(t.uses_calls for t in recipe.transforms):
            view.float_calls = calls
        streams.float = float_pass(view, runner, calls, at, needs, sorted(captured), tokens)
        models.empty(runner)

    def _affordable(self, view: BlockView, at: Sequence[Place], needs: frozenset[str]) -> list[Place]:
        """The places, without those of experts where the statistics of all experts, which the float pass holds at once, would take too much."""
        stacks = {n: view.structure.layer(n) for place in at if place.expert is not None for n in place.layers}
        taken = sum(gathered_bytes(layer, needs) for layer in stacks.values())
        if taken <= MOST_OF_EXPERTS:
            return list(at)
        view.notes.append(f"what the experts of a block read is not gathered in the float pass: it would take {taken / 2**30:.1f} GiB at once")
        return [place for place in at if place.expert is None]

    def _rounded(self, work: LayerWork, at: Sequence[Place], streams: Streams) -> None:
        """Round place by place on the activations of the model as rounded so far."""
        view, structure = work.view, work.view.structure
        needs = self.recipe.rounding.needs | self.recipe.grid.needs
        runner = copy.deepcopy(view.module).to(self.compute)
        sliced: dict[str, Slices] = {}

        def on_place(place: Place, statistics: list[Statistics]) -> None:
            if place.expert is None and len(statistics) == 1:
                for layer, decoded in work.together(place.layers, statistics[0]):
                    layer.write(runner, decoded)
                return
            for layer in map(structure.layer, place.layers):
                if layer.name not in sliced:
                    sliced[layer.name] = work.slices(layer)
                for k, seen in enumerate(statistics, place.expert or 0):
                    decoded = work.round_slice(layer, sliced[layer.name], k, seen)
                    if place.expert is not None:
                        layer.matrix(runner)[k] = decoded
                if place.expert is None:  # a grouped convolution: all of it was seen
                    layer.write(runner, work.joined(layer, sliced.pop(layer.name)))

        calls = streams.calls(view.index, streams.rounded)
        outputs = rounded_pass(view, runner, calls, at, needs, on_place)
        late = False
        for layer in structure.layers:
            if layer.name not in view.schemes or work.is_done(layer):
                continue
            if layer.name in sliced:
                layer.write(runner, work.joined(layer, sliced[layer.name]))
            else:  # entered by no batch, or not as what it is
                late = True
                layer.write(runner, work.alone(layer))
        streams.rounded = run(runner, calls) if late else outputs
        models.empty(runner)

    def _reconstructed(self, work: LayerWork, streams: Streams, part: BlockRounding) -> None:
        """Round the block's layers together, so that on the activations of the model as rounded so far it returns what the float block returns
        in the float model."""
        assert streams.float is not None
        view, structure = work.view, work.view.structure
        calls, targets = streams.calls(view.index, streams.rounded), streams.float
        layers = [structure.layer(n) for names in structure.groups(view.schemes) for n in names]
        params = {x.name: work.grid(x, x.flat(view.module), view.statistics.get(x.name)) for x in layers}
        for layer in structure.layers:  # not called as modules (stacks of experts): first, so that the others make up for them
            if layer.name in view.schemes and layer.name not in params:
                layer.write(view.module, work.alone(layer))
        found = part.reconstruct(view, calls, targets, params) if params else {}
        runner = copy.deepcopy(view.module).to(self.compute)
        for layer in layers:
            rounded = found.get(layer.name)
            layer.write(runner, work.alone(layer) if rounded is None else work.record(layer, rounded, view.statistics.get(layer.name)))
        streams.rounded = run(runner, calls)
        models.empty(runner)

    # -- which layers, on which scheme ------------------------------------------------------------------------------------

    def _structure(self, module: nn.Module, probe: Call | None) -> Structure:
        """The block's layers and proved sites. Blocks of one shape share a proof; its sites are verified again on each."""
        if probe is None:
            return graph.layers_of(module)
        key = (type(module), tuple((n, tuple(p.shape)) for n, p in module.named_parameters()))
        calls = [(probe.args, probe.kwargs)]
        with torch.enable_grad():  # structure is traced by gradients
            if key not in self.structures:
                self.structures[key] = graph.discover_block(module, calls)
                return self.structures[key]
            return graph.verified(self.structures[key], module, calls) if self.recipe.uses_sites else self.structures[key]

    def _schemes(self, prefix: str, module: nn.Module, structure: Structure, notes: list[str]) -> dict[str, WeightScheme]:
        """The scheme of each layer of a block that is to be quantized, by its name inside the block."""
        found: dict[str, WeightScheme] = {}
        for layer in structure.layers:
            full = self.context.known_as(absolute(layer.name, prefix))
            scheme = self.recipe.scheme_of(full, layer)
            if scheme is None:
                continue
            if aliases := self.context.aliases(absolute(layer.parameter, prefix)):
                notes.append(f"{full}: stays float, since {aliases[0]} is the same tensor")
                continue
            try:
                scheme.layout(*layer.flat(module).shape)
            except ValueError as error:
                raise UsageError(f"{full}: {error}; choose another scheme, or skip the layer") from None
            found[layer.name] = scheme
        return found

    def _settle(self, view: BlockView, unit: Unit) -> None:
        """Round what stays float to its storage type now, so that the streams see what the checkpoint will hold."""
        rounded = {layer.parameter for layer in view.structure.layers if layer.name in view.schemes}
        for n, tensor in _state(view.module):
            if n not in rounded and tensor.is_floating_point():
                tensor.copy_(tensor.to(self.context.dtype_of(absolute(n, unit.name))))


def _site(prefix: str, site: Site) -> dict[str, Any]:
    """A proved site as plain data: what it is, and the layers that read it."""
    readers = [absolute(c.layer, prefix) for c in site.consumers if c.layer is not None]
    return {"site": f"{prefix}: {site}" if prefix else str(site), "readers": readers}


def _state(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and stored buffers."""
    skipped = {absolute(b, p) for p, m in module.named_modules() for b in m._non_persistent_buffers_set}
    buffers = [(n, b) for n, b in module.named_buffers() if n not in skipped]
    return [(n, p.data) for n, p in module.named_parameters()] + buffers
