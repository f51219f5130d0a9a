"""The engine: one call that takes any model, a recipe and some data, and gives a few-bit model.

    quantize(model_or_path, recipe, calibration, out) -> Quantized

A model that is a chain of repeated blocks is streamed: one block at a time is read from its files, rounded, written, and let go; peak
memory is one block plus the activations of the calibration data. Any other model (several chains, no chain) is one block.
For each block:

    float pass      the float block on the float model's activations: statistics for transforms (only if the recipe asks)
    transforms      rewrites at the block's proved sites
    rounded pass    the block on the activations of the model as rounded so far, pausing at each group of layers
                    (`quant.walker`): grid, rounding, and on through the rounded layer
    store           the finished block goes to disk (`quant.store`)

Both passes run in the *compute type*: bfloat16 where the CPU multiplies it natively, else float32. Weights, grids and roundings are float32,
Hessians float64.
"""

from __future__ import annotations

import copy
import fnmatch
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dither import graph, models
from dither.errors import CalibrationError, ModelError
from dither.formats import Scheme
from dither.graph import Layer, Site, Structure
from dither.quant.assemble import assemble, restore
from dither.quant.chain import block_chain
from dither.quant.checkpoint import finish, load, quantization_config
from dither.quant.outcome import Event, LayerReport, Quantized, Report
from dither.quant.parts import BlockView
from dither.quant.recipe import Chain, Method, Recipe, as_recipe
from dither.quant.rounding.nearest import nearest
from dither.quant.statistics import Statistics
from dither.quant.store import Store, fingerprint
from dither.quant.streams import Streams, float_pass, padding_mask, rounded_pass, shorten
from dither.quant.unit import Unit
from dither.quant.walker import Call, capture_calls, run

Calibration = Any  # text, texts, a path, tokens [N, L], a dict of tensors, or a list of dicts


def compute_dtype() -> torch.dtype:
    """bfloat16 where the CPU multiplies it natively (AVX-512 BF16 or AMX), else float32."""
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def peak_memory() -> int:
    """Peak resident memory of this process alone, bytes. (``ru_maxrss`` passes through fork and exec on Linux, so the small child of a
    large parent would report the parent's; it is only asked where there is no ``/proc``.)"""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    peak = next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)
    return peak if peak is not None else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@torch.no_grad()
def quantize(
    model: str | Path | nn.Module,
    recipe: Recipe | Method | Chain,
    calibration: Calibration = None,
    out: str | Path | None = None,
    *,
    samples: int = 64,
    length: int = 512,
    seed: int = 0,
    tokenizer: Any = None,
    overwrite: bool = False,
    batch_tokens: int = 2048,
    compute: torch.dtype | None = None,
    progress: Callable[[Event], None] | None = None,
) -> Quantized:
    """Quantize a model.

    ``model``: a hub id, a folder, a GGUF file, ``"smollm2"``, or any ``torch.nn.Module`` (which is copied, not changed).
    ``calibration``: text, a list of texts, a file or folder of text, tokens ``[N, L]`` int64, a dict of model inputs or a list of
    them (all used as given); None takes the embedded text. ``samples`` x ``length`` tokens are drawn from text under ``seed``.
    ``out``: folder of the checkpoint. None keeps the result in memory. ``compute``: type the calibration data runs in.

    Raises ModelError, CheckpointError, CalibrationError, UsageError; ValueError for non-finite weights or activations.
    """
    started, cpu_started = time.perf_counter(), time.process_time()
    plan = as_recipe(recipe)
    source = models.MemorySource(model, tokenizer) if isinstance(model, nn.Module) else models.open(model)
    batches = calibration_batches(plan, source, calibration, samples, length, seed, batch_tokens, tokenizer)
    job = _Job(source, plan, batches, compute or compute_dtype(), progress or (lambda event: None))
    store = None
    if out is not None:
        store = Store(
            out,
            {
                "format": 1,
                "model": source.fingerprint(),
                "recipe": plan.to_json(),
                "seed": seed,
                "compute": str(job.compute),
                "calibration": fingerprint(*[t for b in batches for t in b.values()]) if batches else None,
            },
            overwrite=overwrite,
        )
    if store is not None and store.complete:
        report = Report.read(store.out)
        report.notes.append("already complete: nothing was done")
    else:
        report = job.run(store)
    report.seconds, report.cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    report.peak_memory_bytes = peak_memory()
    return Quantized(
        report, store.out if store else None, job.result, lambda out: load(out, model=_float_copy(model))[0]
    )


def calibration_batches(
    recipe: Recipe,
    source: models.Source,
    calibration: Calibration,
    samples: int,
    length: int,
    seed: int,
    batch_tokens: int,
    tokenizer: Any = None,
) -> list[dict[str, Tensor]]:
    """The calibration data as model inputs, cut into batches of about ``batch_tokens`` tokens. Empty if no part needs data."""
    if isinstance(calibration, dict):
        return [calibration]
    if isinstance(calibration, Sequence) and not isinstance(calibration, str):
        if len(calibration) == 0:
            raise CalibrationError("calibration: is empty; give text, tokens or model inputs")
        if isinstance(calibration[0], dict):
            return list(calibration)
    if not recipe.needs_data:
        return []
    if tokenizer is None and not isinstance(calibration, Tensor):
        tokenizer = source.tokenizer()
    tokens = models.calibration_tokens(calibration, tokenizer, samples=samples, length=length, seed=seed)
    return [{"input_ids": part} for part in torch.split(tokens, max(1, batch_tokens // tokens.shape[1]))]


class _Job:
    """One run over one model."""

    def __init__(
        self,
        source: models.Source,
        recipe: Recipe,
        batches: list[dict[str, Tensor]],
        compute: torch.dtype,
        progress: Callable[[Event], None],
    ) -> None:
        self.source, self.recipe, self.batches, self.compute = source, recipe, batches, compute
        self.progress = progress
        self.report = Report(notes=list(source.notes))
        self.result: nn.Module | None = None
        self.structures: dict[tuple[Any, ...], Structure] = {}

    def run(self, store: Store | None) -> Report:
        skeleton = self.source.skeleton()
        _prepare(skeleton)
        chain = block_chain(skeleton)
        if chain is None:
            self.report.notes.append("the model is no single chain of repeated blocks: it is handled whole, in memory")
            blocks = [("", skeleton)]
        else:
            blocks = chain
        prefixes = [name for name, _ in blocks]
        modules = [module for _, module in blocks]
        outside = store.read(0) if store is not None and store.finished(0) else self._outside(skeleton, prefixes)
        if store is not None and not store.finished(0):
            store.write(outside, 0)
        units = [outside.without_tensors() if store is not None else outside]
        del outside
        probes, calls = self._capture(skeleton, prefixes, modules)
        streams = Streams(calls, use_float=self._uses_float, use_rounded=bool(self.recipe.rounding.needs))
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
            units.append(unit.without_tensors() if store is not None else unit)
            bits = unit.stored_bits / unit.weights if unit.weights else None
            self.progress(Event(i + 1, len(blocks), name or "model", unit.mean_error, bits, peak_memory()))
        self._summarise(units)
        if not self.report.layers:
            raise ModelError(
                f"{self.source.name}: no layer to quantize was found (all skipped, or none of a known kind)"
            )
        if store is not None:
            finish(store, units, self.source, self.recipe, self.report)
        else:
            self.result = assemble(self.source, units)
            if self.source.config is not None and hasattr(self.result, "save_pretrained"):
                from dither.quant import hf  # transformers' quantizers are only needed here

                hf.adopt(self.result, quantization_config(units, self.recipe))
        return self.report

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
        weights = sum(unit.weights for unit in units)
        report.bits_per_weight = sum(unit.stored_bits for unit in units) / max(weights, 1)

    @property
    def _uses_float(self) -> bool:
        return bool(self.recipe.transforms) or (bool(self.recipe.grid.needs) and not self.recipe.rounding.needs)

    # -- calibration data up to the first block -------------------------------------------------------------------

    def _capture(
        self, skeleton: nn.Module, prefixes: list[str], modules: list[nn.Module]
    ) -> tuple[list[list[Call]], list[list[Call]]]:
        """Each block's calls: by a probe of a few tokens, and by every batch. Hidden states are in the compute type."""
        batches = [_floats_as(b, self.compute) for b in self.batches] if self.recipe.needs_data else []
        given = bool(self.batches)
        sample = _floats_as(shorten(self.batches[0]), self.compute) if given else _token_sample(self.source.config)
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
            key = f"{name}.weight"
            if scheme is None or not isinstance(module, nn.Linear | nn.Embedding) or key in self.source.tied:
                continue
            weight = self.source.tensor(key, torch.float32, check_finite=True)
            tensor, row = nearest(weight, scheme), self._row(name, -1, weight, scheme)
            row.measure(weight, tensor.dequantize(), None)
            unit.add(key, "embedding" if isinstance(module, nn.Embedding) else "linear", tensor, row)
        for name in self.source.names():
            inside = any(name.startswith(p + ".") for p in prefixes)
            if not inside and name not in self.source.tied and name not in unit.replaced:
                unit.keep(name, self.source.tensor(name, check_finite=True))
        return unit

    # -- one block ------------------------------------------------------------------------------------------------

    def _block(self, i: int, name: str, module: nn.Module, streams: Streams, probe: Call | None) -> Unit:
        recipe = self.recipe
        structure = self._structure(name, module, probe)
        schemes = self._schemes(name, structure)
        groups = structure.groups(schemes)
        unit = Unit(name)
        view = BlockView(i, name or "model", module, structure, {}, schemes, self.compute, {})
        if recipe.grid.spare_attention:
            view.spared = structure.attention_logit_layers
        if self._uses_float:
            self._float(view, groups, streams, i)
            for transform in recipe.transforms:
                transform.apply(view)
            unit.sites += view.findings
        if recipe.uses_sites:
            unit.proved = [_site(name, site) for site in structure.sites]
            unit.unproved = [f"{_join(name, n)}: {why}" for n, why in structure.unproved]
        self._settle(name, module, structure, schemes)

        if recipe.rounding.needs:
            self._rounded(unit, view, groups, streams, i)
        for layer in structure.layers:
            if layer.name in schemes and _join(name, layer.parameter) not in unit.replaced:
                self._round(unit, view, layer, view.statistics.get(layer.name))
        for n, tensor in _state(module):
            full = _join(name, n)
            if full not in unit.replaced and full not in self.source.tied:
                unit.keep(full, tensor.to(self.source.dtype_of(full)))
        return unit

    def _float(self, view: BlockView, groups: Sequence[Sequence[str]], streams: Streams, i: int) -> None:
        """Statistics, and the arguments of the modules that transforms search on, from the float model's activations."""
        recipe = self.recipe
        needs = frozenset().union(
            *(t.needs for t in recipe.transforms), () if recipe.rounding.needs else recipe.grid.needs
        )
        captured = {name for t in recipe.transforms for name in t.captures(view)}
        tokens = max((t.tokens for t in recipe.transforms), default=0)
        runner = copy.deepcopy(view.module).to(self.compute)
        calls = streams.calls(i, streams.float)
        streams.float = float_pass(view, runner, calls, groups, needs, sorted(captured), tokens)

    def _rounded(self, unit: Unit, view: BlockView, groups: Sequence[Sequence[str]], streams: Streams, i: int) -> None:
        """Round group by group on the activations of the model as rounded so far."""
        needs = self.recipe.rounding.needs | self.recipe.grid.needs
        runner = copy.deepcopy(view.module).to(self.compute)

        def on_group(names: Sequence[str], statistics: Statistics) -> None:
            for n in names:
                layer = view.structure.layer(n)
                layer.write(runner, self._round(unit, view, layer, statistics))

        calls = streams.calls(i, streams.rounded)
        outputs = rounded_pass(unit.name, runner, calls, groups, needs, on_group)
        late = [
            x
            for x in view.structure.layers
            if x.name in view.schemes and _join(unit.name, x.parameter) not in unit.replaced
        ]
        for layer in late:  # never entered as a module (stacks of experts), or by no batch
            layer.write(runner, self._round(unit, view, layer, None))
        streams.rounded = run(runner, calls) if late else outputs

    def _round(self, unit: Unit, view: BlockView, layer: Layer, statistics: Statistics | None) -> Tensor:
        """Grid, then codes, of one layer; records them in ``unit`` and returns the decoded weight in the layer's matrix shape."""
        scheme = view.schemes[layer.name]
        weight = layer.matrix(view.module).detach().float()
        flat = weight.reshape(-1, weight.shape[-1])
        full = _join(unit.name, layer.name)
        spared = layer.name in view.spared
        params = scheme.fit(flat) if spared else self.recipe.grid.fit(flat, scheme, statistics)
        rounded = self.recipe.rounding.round(flat, scheme, params, statistics)
        decoded = rounded.tensor.dequantize(torch.float32).reshape(weight.shape)
        row = self._row(full, view.index, flat, scheme, statistics)
        row.loss, row.damp, row.fallback = rounded.loss, rounded.damp, rounded.fallback
        row.measure(flat, decoded.reshape(flat.shape), statistics)
        kind = "linear" if layer.kind == "linear" else "parameter"
        unit.add(
            _join(unit.name, layer.parameter), kind, rounded.tensor, row, storage=layer.shape, swapped=layer.swapped
        )
        return decoded

    def _row(
        self, name: str, block: int, weight: Tensor, scheme: Scheme, statistics: Statistics | None = None
    ) -> LayerReport:
        return LayerReport(
            name, block, tuple(weight.shape), str(scheme), tokens=0 if statistics is None else statistics.tokens
        )

    def _settle(self, name: str, module: nn.Module, structure: Structure, schemes: dict[str, Scheme]) -> None:
        """Round what stays float to its storage type now, so that the streams see what the checkpoint will hold."""
        rounded = {layer.parameter for layer in structure.layers if layer.name in schemes}
        for n, tensor in _state(module):
            if n not in rounded and tensor.is_floating_point():
                tensor.copy_(tensor.to(self.source.dtype_of(_join(name, n))))

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

    def _override(self, name: str) -> Scheme | None:
        return next((scheme for pattern, scheme in self.recipe.overrides if fnmatch.fnmatchcase(name, pattern)), None)

    def _schemes(self, prefix: str, structure: Structure) -> dict[str, Scheme]:
        """The scheme of each layer of a block that is to be quantized, by its name inside the block."""
        found = {}
        for layer in structure.layers:
            full = _join(prefix, layer.name)
            if any(fnmatch.fnmatchcase(full, pattern) for pattern in self.recipe.skip):
                continue
            scheme = self._override(full)
            if scheme is None and (layer.is_head or layer.routes or layer.out_features < self.recipe.min_outputs):
                continue
            found[layer.name] = scheme or self.recipe.weights
        return found


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


def _token_sample(config: Any) -> dict[str, Tensor] | None:
    """Token ids to prove structure with, where a recipe comes without data: two rows of 16. None for models of anything but tokens."""
    size = getattr(config, "vocab_size", None)
    return (
        None if not isinstance(size, int) or size < 2 else {"input_ids": (torch.arange(32) * 7919 % size).view(2, 16)}
    )


def _runs(model: nn.Module, sample: dict[str, Tensor]) -> bool:
    """Whether the model takes such inputs at all (an encoder-decoder wants more than token ids)."""
    try:
        model(**sample)
    except Exception:  # whatever a model says of inputs that it does not take
        return False
    return True


def _floats_as(batch: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The same inputs with floating ones (pixels, spectra) in the compute type."""
    return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in batch.items()}


def _float_copy(model: str | Path | nn.Module) -> nn.Module | None:
    """What to load a checkpoint into, where transformers cannot build the model."""
    is_foreign = isinstance(model, nn.Module) and not hasattr(model, "config")
    return copy.deepcopy(model) if is_foreign else None  # type: ignore[return-value]


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
            scheme = Scheme.from_json(entry["scheme"])
            width = entry["shape"][-1]
            if entry["kind"] != "embedding" and scheme.is_ragged(width):
                found[str(scheme), width] = found.get((str(scheme), width), 0) + 1
    return [
        f"{count} layers of {width} inputs under {scheme}: the last group of each row is shorter"
        for (scheme, width), count in found.items()
    ]
