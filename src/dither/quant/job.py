"""One run over one model: what lies outside its blocks, the calibration data up to the first of them, each block in turn (`quant.block`), and
the result: on disk block by block (`quant.store`), or in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from dither import models
from dither.errors import ModelError, UsageError
from dither.formats import Scheme, scheme_from_json
from dither.quant.assemble import assemble
from dither.quant.attention_inputs import Attention
from dither.quant.block import BlockWork
from dither.quant.calibration import floats_as, sample_count, token_sample
from dither.quant.chain import block_chain, every_block
from dither.quant.checkpoint import finish, quantization_config
from dither.quant.context import Context
from dither.quant.inputs import InputQuant
from dither.quant.outcome import Event, LayerReport, Report, peak_memory
from dither.quant.parts import ModelView
from dither.quant.recipe import Recipe
from dither.quant.rounding.nearest import nearest
from dither.quant.statistics import HESSIAN
from dither.quant.store import Store
from dither.quant.streams import Streams, padding_mask, shorten
from dither.quant.surroundings import Surroundings, check_attention, surround
from dither.quant.unit import Unit
from dither.quant.walker import Call, capture_calls

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
        self.turns: dict[str, int] = {}
        self.rotate_heads = False
        self.inputs: dict[str, InputQuant] = {}  # by full layer name, of model stages
        self.report = Report(notes=list(source.notes))
        self.result: nn.Module | None = None
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
        samples = sample_count(self.batches)
        context = Context(
            self.source, self.recipe, self.compute, self.seed, samples, self.progress, len(blocks), self.turns, self.inputs
        )
        prefixes = [name for name, _ in blocks]
        modules = [module for _, module in blocks]
        outside = store.read(0) if store is not None and store.finished(0) else self._outside(context, skeleton, prefixes)
        if store is not None and not store.finished(0):
            store.write(outside, 0)
        units = [outside.without_tensors() if store is not None else outside]
        del outside
        probes, calls = self._capture(skeleton, prefixes, modules)
        work = BlockWork(context)
        streams = Streams(calls, use_float=self.recipe.uses_float_stream, use_rounded=self.recipe.uses_rounded_stream)
        for i, (name, module) in enumerate(blocks):
            self.progress(Event(i, len(blocks), name or "model", memory=peak_memory()))
            if store is not None and store.finished(i + 1):
                unit = store.read(i + 1)
                work.pass_by(i, name, module, streams, unit)
                self.report.resumed_blocks += 1
            else:
                self.source.fill(module, name, dtype=torch.float32)
                unit = work.do(i, name, module, streams, probes[i][0] if probes[i] else None)
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

    def _outside(self, context: Context, skeleton: nn.Module, prefixes: list[str]) -> Unit:
        """Embeddings, head, final norm: float as stored, unless an override names them. Tied weights are stored once."""
        unit = Unit("")
        if prefixes == [""]:
            return unit
        outside = {
            n: m for n, m in skeleton.named_modules() if not any(n == p or n.startswith(p + ".") for p in prefixes)
        }
        for name, module in outside.items():
            scheme = context.override(name)
            if scheme is None and isinstance(module, nn.Embedding) and not context.skips(name):
                scheme = self.recipe.embeddings
            key = f"{name}.weight"
            if scheme is None or not isinstance(module, nn.Linear | nn.Embedding | _ConvNd) or key in self.source.tied:
                continue
            if (readers := context.aliases(key)) and not (
                isinstance(module, nn.Embedding)
                and all(isinstance(skeleton.get_submodule(r.rpartition(".")[0]), nn.Linear | nn.Embedding) for r in readers)
            ):
                unit.notes.append(f"{name}: stays float, since {readers[0]} is the same tensor")
                continue
            if not isinstance(scheme, Scheme):
                raise UsageError(f"{name}: lies outside the blocks, where only grids of numbers can be used, not {scheme}")
            stored = self.source.tensor(key, torch.float32, check_finite=True)
            weight = stored.flatten(1)
            tensor, row = nearest(weight, scheme), LayerReport(name, -1, tuple(weight.shape), str(scheme))
            row.measure(weight, tensor.dequantize(), None)
            kind = "embedding" if isinstance(module, nn.Embedding) else "linear" if isinstance(module, nn.Linear) else "parameter"
            unit.add(key, kind, tensor, row, storage=tuple(stored.shape))
        for name in self.source.names():
            inside = any(name.startswith(p + ".") for p in prefixes)
            if not inside and name not in self.source.tied and name not in unit.replaced:
                unit.keep(name, self.source.tensor(name, check_finite=True))
        return unit

def _attention(units: Sequence[Unit]) -> Attention:
    """How the operands of attention are rounded, of all blocks."""
    return {name: records for unit in units for name, records in unit.attention.items()}


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
