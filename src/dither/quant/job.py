"""One run over one model. For each block:

    float pass      the float block on the float model's activations: statistics for transforms (only if the recipe asks)
    transforms      rewrites at the block's proved sites
    rounded pass    the block on the activations of the model as rounded so far, pausing at each group of layers
                    (`quant.walker`): grid, rounding, and on through the rounded layer
    store           the finished block goes to disk (`quant.store`)
"""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from dither import graph, models
from dither.errors import ModelError, UsageError
from dither.formats import Params, Scheme, WeightScheme, scheme_from_json
from dither.graph import Layer, Site, Structure
from dither.quant.assemble import assemble, restore
from dither.quant.attention_inputs import Attention
from dither.quant.calibration import floats_as, sample_count, token_sample
from dither.quant.chain import block_chain, every_block
from dither.quant.checkpoint import finish, quantization_config
from dither.quant.inputs import InputQuant
from dither.quant.outcome import Event, LayerReport, Report, peak_memory
from dither.quant.parts import BlockRounding, BlockView, ModelView, Rounded, Task
from dither.quant.recipe import Recipe
from dither.quant.rounding.nearest import nearest
from dither.quant.slices import Place, Slices, is_separable, places, slice_count
from dither.quant.statistics import HESSIAN, Statistics
from dither.quant.store import Store
from dither.quant.streams import Streams, float_pass, padding_mask, rounded_pass, shorten
from dither.quant.surroundings import Surroundings, check_attention, surround
from dither.quant.unit import Unit
from dither.quant.walker import Call, capture_calls, run

TRIM_EVERY = 8  # blocks: what is freed serves the next one meanwhile (its pages need no clearing), and holes in the heap do not add up


class Job:
    """One run over one model."""

    def __init__(
        self,
        source: models.Source,
        recipe: Recipe,
        batches: list[dict[str, Tensor]],
        compute: torch.dtype,
        seed: int,
        progress: Callable[[Event], None],
    ) -> None:
        self.source, self.recipe, self.batches, self.compute = source, recipe, batches, compute
        self.seed, self.progress = seed, progress
        self.blocks = 0
        self.turns: dict[str, int] = {}
        self.rotate_heads = False
        self.inputs: dict[str, InputQuant] = {}  # by full layer name, of model stages
        self.report = Report(notes=list(source.notes))
        self.result: nn.Module | None = None
        self.structures: dict[tuple[Any, ...], Structure] = {}
        self.apart: dict[str, str] = {}  # names that share a tensor with the named one in the float model, but not in the result

    def run(self, store: Store | None) -> Report:
        skeleton = self._separate()
        if self.recipe.kv is not None:
            check_attention(skeleton)
        if self.recipe.model_stages:
            self._model_stages(store)
            skeleton = self.source.skeleton()
        _prepare(skeleton)
        chain = block_chain(skeleton)
        if chain is None:
            self.report.notes.append("the model is no single chain of repeated blocks: it is handled whole, in memory")
            blocks = [("", skeleton)]
        else:
            blocks = chain
        self.blocks = len(blocks)
        prefixes = [name for name, _ in blocks]
        modules = [module for _, module in blocks]
        outside = store.read(0) if store is not None and store.finished(0) else self._outside(skeleton, prefixes)
        if store is not None and not store.finished(0):
            store.write(outside, 0)
        units = [outside.without_tensors() if store is not None else outside]
        del outside
        probes, calls = self._capture(skeleton, prefixes, modules)
        streams = Streams(calls, use_float=self._uses_float, use_rounded=self._uses_rounded)
        for i, (name, module) in enumerate(blocks):
            self.progress(Event(i, len(blocks), name or "model", memory=peak_memory()))
            if store is not None and store.finished(i + 1):
                unit = store.read(i + 1)
                self._pass_by(i, name, module, streams, unit)
                self.report.resumed_blocks += 1
            else:
                self.source.fill(module, name, dtype=torch.float32)
                unit = self._block(i, name, module, streams, probes[i][0] if probes[i] else None)
                if store is not None:
                    store.write(unit, i + 1)
            if name:
                self.source.release(module)
            streams.done(i)
            if i % TRIM_EVERY == TRIM_EVERY - 1:
                models.return_freed_memory()
            units.append(unit.without_tensors() if store is not None else unit)
            bits = unit.stored_bits / unit.weights if unit.weights else None
            self.progress(Event(i + 1, len(blocks), name or "model", unit.mean_error, bits, peak_memory()))
        self._summarise(units)
        if not self.report.layers:
            raise ModelError(
                f"{self.source.name}: no layer to quantize was found (all skipped, or none of a known kind)"
            )
        around = Surroundings(self.turns, self.recipe.kv, self.rotate_heads, _attention(units))
        config = quantization_config(units, self.recipe, around, list(self.apart))
        if store is not None:
            finish(store, len(units), config, self.source, self.report)
        else:
            self.result = assemble(self.source, units)
            surround(self.result, config)
            if self.source.config is not None and hasattr(self.result, "save_pretrained"):
                from dither.quant import hf  # transformers' quantizers are only needed here

                hf.adopt(self.result, config)
        return self.report

    def _separate(self) -> nn.Module:
        """The skeleton of the source, which from here on has tensors of their own under names that cannot share one (`models.sharing`)."""
        original, skeleton = self.source, self.source.skeleton()
        while (shares := models.find_shares(original, skeleton, every_block(skeleton))).apart:  # a model of fewer ties may have another chain
            self.apart |= {name: self.apart.get(first, first) for name, first in shares.apart.items()}
            self.source = models.UntiedSource(original, self.apart)
            skeleton = self.source.skeleton()
        self.report.notes += models.Shares(self.apart, shares.together).notes()
        return skeleton

    def _model_stages(self, store: Store | None) -> None:
        """Let model stages rewrite the whole model in memory; from here on the result is the source."""
        source, model = self.source, self.source.skeleton()
        _prepare(model)
        source.fill(model, "", dtype=torch.float32)
        remember = store.remember if store is not None else lambda name, make: make()
        sample = shorten(self.batches[0]) if self.batches else token_sample(source.config)
        view = ModelView(model, self.batches, self.recipe, self.compute, self.seed, remember, self._say, sample=sample)
        for stage in self.recipe.model_stages:
            stage.apply(view)
        self.turns, self.rotate_heads, self.inputs = view.turns, view.rotate_heads, view.inputs
        self.report.notes += view.notes
        self.report.sites += view.findings
        self.source = models.RewrittenSource(model, source)

    def _say(self, what: str) -> None:
        self.progress(Event(0, 0, what, memory=peak_memory()))

    def _summarise(self, units: Sequence[Unit]) -> None:
        report = self.report
        for unit in units:
            report.layers += unit.layers
            report.sites += unit.sites
            report.proved += unit.proved
            report.unproved += unit.unproved
            report.notes += [n for n in unit.notes if n not in report.notes]
            report.kept_float += unit.kept
        report.notes += _ragged_notes(report.layers, units)
        if HESSIAN in self.recipe.rounding.needs:
            thin = [row for row in report.layers if 0 < row.tokens < 4 * row.shape[-1]]
            if thin:
                report.notes.append(
                    f"{len(thin)} layers saw fewer than 4 calibration tokens an input (first {thin[0].name}: {thin[0].tokens} for "
                    f"{thin[0].shape[-1]}): their rounding fits noise; use more --samples"
                )
        weights = sum(unit.weights for unit in units)
        report.bits_per_weight = sum(unit.stored_bits for unit in units) / max(weights, 1)

    @property
    def _uses_float(self) -> bool:
        grid_alone = bool(self.recipe.grid.needs) and not self.recipe.rounding.needs
        return bool(self.recipe.transforms) or grid_alone or self._by_block or self._on_float

    @property
    def _uses_rounded(self) -> bool:
        return (bool(self.recipe.rounding.needs) and not self._on_float) or self._by_block

    @property
    def _on_float(self) -> bool:
        """Whether layers are rounded on the float model's activations."""
        return bool(self.recipe.rounding.needs) and self.recipe.rounding.float_inputs

    @property
    def _by_block(self) -> bool:
        return isinstance(self.recipe.rounding, BlockRounding)

    # -- calibration data up to the first block -------------------------------------------------------------------

    def _capture(
        self, skeleton: nn.Module, prefixes: list[str], modules: list[nn.Module]
    ) -> tuple[list[list[Call]], list[list[Call]]]:
        """Each block's calls: by a probe of a few tokens, and by every batch. Hidden states are in the compute type."""
        batches = [floats_as(b, self.compute) for b in self.batches] if self.recipe.needs_data else []
        given = bool(self.batches)
        sample = floats_as(shorten(self.batches[0]), self.compute) if given else token_sample(self.source.config)
        if sample is None:
            return [[] for _ in prefixes], [[] for _ in prefixes]
        if prefixes == [""]:
            self.source.fill(skeleton, "", dtype=self.compute)
            probe = [Call((), sample)] if given or _runs(skeleton, sample) else []
            return [probe], [[Call((), b, padding_mask(b)) for b in batches]]
        self.source.fill(skeleton, "", except_prefixes=prefixes, dtype=self.compute)

        def first_block() -> nn.Module:
            self.source.fill(modules[0], prefixes[0], dtype=self.compute)
            return modules[0]

        probes = capture_calls(skeleton, modules, [sample], first_block)
        calls = capture_calls(skeleton, modules, batches, first_block)
        self.source.release(skeleton)
        if any(len(c) != len(batches) for c in calls):
            raise ModelError(
                f"{self.source.name}: the model does not run all of its repeated blocks on this calibration data"
            )
        return probes, calls

    # -- what lies outside the blocks -----------------------------------------------------------------------------

    def _outside(self, skeleton: nn.Module, prefixes: list[str]) -> Unit:
        """Embeddings, head, final norm: float as stored, unless an override names them. Tied weights are stored once."""
        unit = Unit("")
        if prefixes == [""]:
            return unit
        outside = {
            n: m for n, m in skeleton.named_modules() if not any(n == p or n.startswith(p + ".") for p in prefixes)
        }
        for name, module in outside.items():
            scheme = self._override(name)
            if scheme is None and isinstance(module, nn.Embedding) and not self._skipped(name):
                scheme = self.recipe.embeddings
            key = f"{name}.weight"
            if scheme is None or not isinstance(module, nn.Linear | nn.Embedding | _ConvNd) or key in self.source.tied:
                continue
            if (readers := self._readers(key)) and not (
                isinstance(module, nn.Embedding)
                and all(isinstance(skeleton.get_submodule(r.rpartition(".")[0]), nn.Linear | nn.Embedding) for r in readers)
            ):
                unit.notes.append(f"{name}: stays float, since {readers[0]} is the same tensor")
                continue
            if not isinstance(scheme, Scheme):
                raise UsageError(f"{name}: lies outside the blocks, where only grids of numbers can be used, not {scheme}")
            stored = self.source.tensor(key, torch.float32, check_finite=True)
            weight = stored.flatten(1)
            tensor, row = nearest(weight, scheme), self._row(name, -1, weight, scheme)
            row.measure(weight, tensor.dequantize(), None)
            kind = "embedding" if isinstance(module, nn.Embedding) else "linear" if isinstance(module, nn.Linear) else "parameter"
            unit.add(key, kind, tensor, row, storage=tuple(stored.shape))
        for name in self.source.names():
            inside = any(name.startswith(p + ".") for p in prefixes)
            if not inside and name not in self.source.tied and name not in unit.replaced:
                unit.keep(name, self.source.tensor(name, check_finite=True))
        return unit

    # -- one block ------------------------------------------------------------------------------------------------

    def _block(self, i: int, name: str, module: nn.Module, streams: Streams, probe: Call | None) -> Unit:
        recipe = self.recipe
        structure = self._structure(name, module, probe)
        if recipe.kv is not None and any(layer.feeds_logits and not layer.routes for layer in structure.layers):
            check_attention(module)
        unit = Unit(name)
        schemes = self._schemes(name, module, structure, unit.notes)
        at = places(structure, module, schemes)
        view = BlockView(i, name or "model", module, structure, {}, schemes, self.compute, {}, self.seed, samples=sample_count(self.batches))
        title = view.name  # not ``view`` itself: a view that held itself would keep its activations until Python's collector runs
        view.say = lambda what: self.progress(Event(i, self.blocks, f"{title}: {what}", memory=peak_memory()))
        if recipe.grid.spare_attention:
            view.spared = structure.attention_logit_layers
        if self._uses_float:
            self._float(view, at, streams, i)
            for transform in recipe.transforms:
                transform.apply(view)
            unit.sites += view.findings
            unit.notes += view.notes
            view.float_calls = []
            for attention, operands in view.attention.items():
                unit.attend(_join(name, attention), operands)
        if recipe.uses_sites:
            unit.proved = [_site(name, site) for site in structure.sites]
            unit.unproved = [f"{_join(name, n)}: {why}" for n, why in structure.unproved]
        self._settle(name, module, structure, schemes)

        if isinstance(recipe.rounding, BlockRounding):
            self._reconstructed(unit, view, streams, i, recipe.rounding)
        elif self._uses_rounded:
            self._rounded(unit, view, at, streams, i)
        elif recipe.rounding.needs:
            for names in structure.groups(schemes):
                if (statistics := view.statistics.get(names[0])) is not None:
                    for n, rounded in zip(names, self._together(view, names, statistics), strict=True):
                        self._round(unit, view, structure.layer(n), statistics, rounded)
        for layer in structure.layers:
            if layer.name in schemes and _join(name, layer.parameter) not in unit.replaced:
                self._round_alone(unit, view, layer)
        for n, tensor in _state(module):
            full = _join(name, n)
            if full not in unit.replaced and full not in self.source.tied:
                unit.keep(full, tensor.to(self._dtype_of(full)))
        return unit

    def _dtype_of(self, name: str) -> torch.dtype:
        """The storage type of a tensor; what a transform added (a bias) takes the model's."""
        return self.source.dtype_of(name) if self.source.has(name) else self.source.dtype

    def _bias_is_new(self, view: BlockView, layer: Layer, name: str) -> bool:
        """Whether a part gave the layer a bias, so that a model made from the configuration alone has none there."""
        original = self.source.original if isinstance(self.source, models.RewrittenSource) else self.source
        return getattr(view.module.get_submodule(layer.name), "bias", None) is not None and not original.has(f"{name}.bias")

    def _float(self, view: BlockView, at: Sequence[Place], streams: Streams, i: int) -> None:
        """Statistics, and the arguments of the modules that transforms search on, from the float model's activations."""
        recipe = self.recipe
        needs = frozenset().union(
            *(t.needs for t in recipe.transforms),
            () if recipe.rounding.needs and not self._on_float else recipe.rounding.needs | recipe.grid.needs,
        )
        captured = {name for t in recipe.transforms for name in t.captures(view)}
        tokens = max((t.tokens for t in recipe.transforms), default=0)
        runner = copy.deepcopy(view.module).to(self.compute)
        calls = streams.calls(i, streams.float)
        if any(t.uses_calls for t in recipe.transforms):
            view.float_calls = calls
        streams.float = float_pass(view, runner, calls, at, needs, sorted(captured), tokens)
        models.empty(runner)

    def _rounded(self, unit: Unit, view: BlockView, at: Sequence[Place], streams: Streams, i: int) -> None:
        """Round place by place on the activations of the model as rounded so far."""
        needs = self.recipe.rounding.needs | self.recipe.grid.needs
        runner = copy.deepcopy(view.module).to(self.compute)
        sliced: dict[str, Slices] = {}

        def on_place(place: Place, statistics: list[Statistics]) -> None:
            if place.expert is None and len(statistics) == 1:
                for n, rounded in zip(place.layers, self._together(view, place.layers, statistics[0]), strict=True):
                    layer = view.structure.layer(n)
                    layer.write(runner, self._round(unit, view, layer, statistics[0], rounded))
                return
            for layer in map(view.structure.layer, place.layers):
                if layer.name not in sliced:
                    sliced[layer.name] = self._slices(view, layer)
                for k, seen in enumerate(statistics, place.expert or 0):
                    decoded = self._round_slice(view, layer, sliced[layer.name], k, seen)
                    if place.expert is not None:
                        layer.matrix(runner)[k] = decoded
                if place.expert is None:  # a grouped convolution: all of it was seen
                    layer.write(runner, self._joined(unit, view, layer, sliced.pop(layer.name)))

        calls = streams.calls(i, streams.rounded)
        outputs = rounded_pass(view, runner, calls, at, needs, on_place)
        late = False
        for layer in view.structure.layers:
            if layer.name not in view.schemes or _join(unit.name, layer.parameter) in unit.replaced:
                continue
            if layer.name in sliced:
                layer.write(runner, self._joined(unit, view, layer, sliced[layer.name]))
            else:  # entered by no batch, or not seen as what it is
                late = True
                layer.write(runner, self._round_alone(unit, view, layer))
        streams.rounded = run(runner, calls) if late else outputs
        models.empty(runner)

    def _round_alone(self, unit: Unit, view: BlockView, layer: Layer) -> Tensor:
        """Round a layer with what the float pass has seen of it, if anything; as `_round`."""
        if layer.name in view.slices:
            slices = self._slices(view, layer)
            for k, statistics in view.slices[layer.name].items():
                self._round_slice(view, layer, slices, k, statistics)
            return self._joined(unit, view, layer, slices)
        decoded = self._round(unit, view, layer, view.statistics.get(layer.name))
        row, scheme = unit.layers[-1], view.schemes[layer.name]
        if row.fallback is not None and slice_count(layer, view.module) > 1 and not is_separable(scheme):
            row.fallback += f" ({scheme} does not let its slices, which have inputs of their own, be rounded apart)"
        return decoded

    def _slices(self, view: BlockView, layer: Layer) -> Slices:
        return Slices(layer.flat(view.module), view.schemes[layer.name], slice_count(layer, view.module))

    def _round_slice(self, view: BlockView, layer: Layer, slices: Slices, k: int, statistics: Statistics | None) -> Tensor:
        """Round slice k of a layer; returns its decoded values ``[O / slices, I]``."""
        return slices.put(k, self._rounding(view, layer, slices.weight[k], statistics), statistics)

    def _joined(self, unit: Unit, view: BlockView, layer: Layer, slices: Slices) -> Tensor:
        """Record a layer whose slices were rounded apart (those nobody saw are now); as `_round`."""
        rounded = slices.joined(lambda weight: self._rounding(view, layer, weight, None))
        decoded = self._round(unit, view, layer, None, rounded)
        unit.layers[-1].tokens, unit.layers[-1].output_error = slices.tokens, slices.output_error
        return decoded

    def _rounding(self, view: BlockView, layer: Layer, weight: Tensor, statistics: Statistics | None) -> Rounded:
        """What the rounding makes of a layer's ``weight [O, I]``, or of a slice of it."""
        scheme, rounding = view.schemes[layer.name], self.recipe.rounding
        grid = self._grid(view, layer, weight, statistics)
        if layer.kind == "linear" or statistics is None:
            return rounding.round(weight, scheme, grid, statistics)
        return rounding.round_together([Task(weight, scheme, grid, is_linear=False)], statistics)[0]

    def _reconstructed(self, unit: Unit, view: BlockView, streams: Streams, i: int, part: BlockRounding) -> None:
        """Round the block's layers together, so that on the activations of the model as rounded so far it returns what the float block returns
        in the float model."""
        assert streams.float is not None
        calls, targets = streams.calls(i, streams.rounded), streams.float
        layers = [view.structure.layer(n) for names in view.structure.groups(view.schemes) for n in names]
        params = {x.name: self._grid(view, x, x.flat(view.module), view.statistics.get(x.name)) for x in layers}
        for layer in view.structure.layers:  # not called as modules (stacks of experts): first, so that the others make up for them
            if layer.name in view.schemes and layer.name not in params:
                layer.write(view.module, self._round_alone(unit, view, layer))
        found = part.reconstruct(view, calls, targets, params) if params else {}
        runner = copy.deepcopy(view.module).to(self.compute)
        for layer in layers:
            layer.write(runner, self._round(unit, view, layer, view.statistics.get(layer.name), found.get(layer.name)))
        streams.rounded = run(runner, calls)
        models.empty(runner)

    def _grid(self, view: BlockView, layer: Layer, weight: Tensor, statistics: Statistics | None) -> Params:
        """The grid of a layer's ``weight [O, I]``, or of a slice of it; empty where its scheme is none."""
        scheme = view.schemes[layer.name]
        if not isinstance(scheme, Scheme):
            return {}
        flat = self.recipe.rounding.aimed_at(weight, statistics)
        return scheme.fit(flat) if layer.name in view.spared else self.recipe.grid.fit(flat, scheme, statistics)

    def _together(self, view: BlockView, names: Sequence[str], statistics: Statistics | None) -> list[Rounded]:
        """What the rounding makes of the layers that read one tensor."""
        tasks = []
        for layer in map(view.structure.layer, names):
            weight = layer.flat(view.module)
            grid = self._grid(view, layer, weight, statistics)
            tasks.append(Task(weight, view.schemes[layer.name], grid, layer.kind == "linear"))
        return self.recipe.rounding.round_together(tasks, statistics)

    def _round(
        self, unit: Unit, view: BlockView, layer: Layer, statistics: Statistics | None, rounded: Rounded | None = None
    ) -> Tensor:
        """Grid, then codes, of one layer (or what a block rounding made of it); records them in ``unit`` and returns the decoded weight in the
        layer's matrix shape."""
        flat = layer.flat(view.module)
        if rounded is None:
            rounded = self._rounding(view, layer, flat, statistics)
        decoded = rounded.tensor.dequantize(torch.float32)
        row = self._row(_join(unit.name, layer.name), view.index, flat, rounded.tensor.scheme, statistics)
        row.loss, row.damp, row.fallback, row.facts = rounded.loss, rounded.damp, rounded.fallback, rounded.facts
        row.measure(flat, decoded, statistics, self.compute)
        kind = "linear" if layer.kind == "linear" else "parameter"
        inputs = rounded.inputs or view.inputs.get(layer.name) or self.inputs.get(self._known_as(_join(unit.name, layer.name)))
        if inputs is None and self.recipe.inputs is not None:
            inputs = InputQuant(self.recipe.inputs)
        if inputs is not None and kind != "linear":
            unit.notes.append(f"{_join(unit.name, layer.name)}: its input stays float, since it is no linear layer")
            inputs = None
        unit.add(
            _join(unit.name, layer.parameter),
            kind,
            rounded.tensor,
            row,
            storage=layer.shape,
            swapped=layer.swapped,
            inputs=inputs,
            added_bias=kind == "linear" and self._bias_is_new(view, layer, _join(unit.name, layer.name)),
        )
        return decoded.reshape(layer.matrix(view.module).shape)

    def _row(
        self, name: str, block: int, weight: Tensor, scheme: WeightScheme, statistics: Statistics | None = None
    ) -> LayerReport:
        return LayerReport(
            name, block, tuple(weight.shape), str(scheme), tokens=0 if statistics is None else statistics.tokens
        )

    def _settle(self, name: str, module: nn.Module, structure: Structure, schemes: dict[str, WeightScheme]) -> None:
        """Round what stays float to its storage type now, so that the streams see what the checkpoint will hold."""
        rounded = {layer.parameter for layer in structure.layers if layer.name in schemes}
        for n, tensor in _state(module):
            if n not in rounded and tensor.is_floating_point():
                tensor.copy_(tensor.to(self._dtype_of(_join(name, n))))

    def _pass_by(self, i: int, name: str, module: nn.Module, streams: Streams, unit: Unit) -> None:
        """Move the streams past a block that an earlier run finished."""
        if streams.float is not None:
            self.source.fill(module, name, dtype=self.compute)
            streams.float = run(module, streams.calls(i, streams.float))
        if streams.rounded is not None:
            self.source.fill(module, name, dtype=torch.float32)
            restore(module, unit, name)
            streams.rounded = run(module.to(self.compute), streams.calls(i, streams.rounded))

    # -- which layers, on which scheme ----------------------------------------------------------------------------

    def _structure(self, name: str, module: nn.Module, probe: Call | None) -> Structure:
        """The block's layers and proved sites. Blocks of one shape share a proof; its sites are verified again on each."""
        key = (type(module), tuple((n, tuple(p.shape)) for n, p in module.named_parameters()))
        if probe is None:
            return graph.layers_of(module)
        calls = [(probe.args, probe.kwargs)]
        with torch.enable_grad():  # structure is traced by gradients
            if key not in self.structures:
                self.structures[key] = graph.discover_block(module, calls)
                return self.structures[key]
            return (
                graph.verified(self.structures[key], module, calls) if self.recipe.uses_sites else self.structures[key]
            )

    def _override(self, name: str) -> WeightScheme | None:
        return next((scheme for pattern, scheme in self.recipe.overrides if fnmatch.fnmatchcase(name, pattern)), None)

    def _skipped(self, name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.recipe.skip)

    def _readers(self, parameter: str) -> list[str]:
        """Other names of a tensor that is stored under this one."""
        return [alias for alias, owner in self.source.tied.items() if owner == parameter]

    def _schemes(self, prefix: str, module: nn.Module, structure: Structure, notes: list[str]) -> dict[str, WeightScheme]:
        """The scheme of each layer of a block that is to be quantized, by its name inside the block."""
        found: dict[str, WeightScheme] = {}
        for layer in structure.layers:
            full = self._known_as(_join(prefix, layer.name))
            scheme = self.recipe.scheme_of(full, layer)
            if scheme is None:
                continue
            if readers := self._readers(_join(prefix, layer.parameter)):
                notes.append(f"{full}: stays float, since {readers[0]} is the same tensor")
                continue
            try:
                scheme.layout(*layer.flat(module).shape)
            except ValueError as error:
                raise UsageError(f"{full}: {error}; choose another scheme, or skip the layer") from None
            found[layer.name] = scheme
        return found

    def _known_as(self, name: str) -> str:
        """A layer's name in the float model, where the layer may have been turned (`online.Turned`)."""
        owner = name.rpartition(".")[0]
        return owner if owner in self.turns else name


def _attention(units: Sequence[Unit]) -> Attention:
    """How the operands of attention are rounded, of all blocks."""
    return {name: records for unit in units for name, records in unit.attention.items()}


def _site(prefix: str, site: Site) -> dict[str, Any]:
    """A proved site as plain data: what it is, and the layers that read it."""
    readers = [_join(prefix, c.layer) for c in site.consumers if c.layer is not None]
    return {"site": f"{prefix}: {site}" if prefix else str(site), "readers": readers}


def _prepare(model: nn.Module) -> None:
    """Settings under which a transformers model shows its structure: no cache between calls, experts as plain matrix products."""
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "use_cache"):
        config.use_cache = False
    choose = getattr(model, "set_experts_implementation", None)
    if callable(choose):
        choose("eager")


def _runs(model: nn.Module, sample: dict[str, Tensor]) -> bool:
    """Whether the model takes such inputs at all (an encoder-decoder wants more than token ids)."""
    try:
        model(**sample)
    except Exception:  # whatever a model says of inputs that it does not take
        return False
    return True


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix and name else prefix or name


def _state(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and stored buffers."""
    skipped = {_join(p, b) for p, m in module.named_modules() for b in m._non_persistent_buffers_set}
    buffers = [(n, b) for n, b in module.named_buffers() if n not in skipped]
    return [(n, p.data) for n, p in module.named_parameters()] + buffers


def _ragged_notes(layers: Sequence[LayerReport], units: Sequence[Unit]) -> list[str]:
    """One line a width that the group size does not divide."""
    found: dict[tuple[str, int], int] = {}
    for unit in units:
        for entry in unit.replaced.values():
            scheme = scheme_from_json(entry["scheme"])
            width = entry["shape"][-1]
            if entry["kind"] != "embedding" and scheme.is_ragged(width):
                found[str(scheme), width] = found.get((str(scheme), width), 0) + 1
    return [
        f"{count} layers of {width} inputs under {scheme}: the last group of each row is shorter"
        for (scheme, width), count in found.items()
    ]
