"""What every recipe owes, whatever its paper: the same bytes again and after a stop, bits that are the bytes on disk, finite outputs, an export or
a clear refusal, less error than rounding to nearest where it claims that, and a float function that stays where it was before anything is rounded.

Each recipe runs on two tiny random architectures; neighbours in the list get others.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors import safe_open
from torch import nn

import dither
import tiny_folder
import tiny_models
from dither import models
from dither.errors import DitherError
from dither.graph.exact import randomize, relative_difference, run_exactly
from dither.quant.block import BlockWork
from dither.quant.outcome import Event
from dither.quant.parts import BlockView
from dither.quant.recipe import Chain, Method, as_recipe
from dither.quant.recipes import (
    AWQ,
    GPTQ,
    LLMFP4,
    METHODS,
    PBLLM,
    RTN,
    VPTQ,
    AdaRound,
    FlexRound,
    OSTQuant,
    QuaRot,
    RepQViT,
    SmoothQuant,
)  # fmt: skip
from dither.quant.rounding.nearest import Nearest
from dither.quant.statistics import HESSIAN
from dither.quant.unit import Unit
from rewriting import TOKENS, output, view_of

# How much of the layers' output error of rounding to nearest, at no fewer bits, is left at most on average. None: its claim is about something else.
RECIPES: dict[str, tuple[Method | Chain, Method | None]] = {
    "rtn": (RTN(bits=4, group=16), None),
    "rtn fp8 inputs": (RTN(format="fp8", act_format="fp8", kv_bits=8), None),
    "gptq": (GPTQ(bits=3, group=16), RTN(bits=3, group=16)),
    "gptq, grids in the loop": (GPTQ(bits=3, group=16, act_order=False, static_groups=False, clip="power"), RTN(bits=3, group=16)),
    "awq": (AWQ(bits=3, group=16), RTN(bits=3, group=16)),
    "llm-fp4": (LLMFP4(candidates=7, max_rows=64), None),
    "pb-llm": (PBLLM(salient=0.1), RTN(bits=2, group=16)),
    "vptq": (VPTQ(centroids=64, kmeans_iters=10), RTN(bits=1, group=16)),
    "adaround": (AdaRound(bits=3, group=16, steps=60), None),
    "flexround": (FlexRound(bits=3, group=16, steps=60), None),
    "quarot": (QuaRot(), RTN(bits=4, group=None, sym=True)),
    "ostquant": (OSTQuant(steps=2, k_top=32), RTN(bits=4, group=None, sym=True)),
    "repq-vit": (RepQViT(bits=4, act_bits=4), None),
    "awq+gptq": (Chain(AWQ(bits=3, group=16, round=False), GPTQ(bits=3, group=16)), RTN(bits=3, group=16)),
    "awq+flexround": (Chain(AWQ(bits=3, group=16, round=False), FlexRound(bits=3, group=16, steps=60)), None),
    "smoothquant": (SmoothQuant(everywhere=True, gqa=True), None),
    "smoothquant+gptq": (Chain(SmoothQuant(bits=4, group=16, round=False), GPTQ(bits=4, group=16)), RTN(bits=4, group=16)),
    "quarot+vptq": (Chain(QuaRot(act_bits=None, kv_bits=None, round=False), VPTQ(centroids=16, kmeans_iters=10)), RTN(bits=1, group=16)),
}
DENSE = ["llama-tied", "qwen2", "mistral", "qwen3", "gemma2", "phi3", "granite", "olmo2", "stablelm", "gpt2", "gpt-neox", "opt", "bloom", "falcon"]
DENSE += ["mixtral", "gpt-oss", "mamba"]
ROTATING = ["llama", "llama-tied", "qwen2", "qwen3", "gpt2", "phi3", "granite"]
IMAGES = ["vit", "swin"]


def architectures(recipe: str) -> list[str]:
    if recipe == "repq-vit":
        return IMAGES
    chosen = ROTATING if as_recipe(RECIPES[recipe][0]).model_stages else DENSE
    first = 2 * list(RECIPES).index(recipe)
    return [chosen[(first + i) % len(chosen)] for i in range(2)]


CASES = [(recipe, architecture) for recipe in RECIPES for architecture in architectures(recipe)]
each = pytest.mark.parametrize(("recipe", "architecture"), CASES, ids=[f"{r}-{a}" for r, a in CASES])


@functools.cache
def calibration(architecture: str) -> Any:
    if architecture in IMAGES:
        pixels = tiny_models.build(architecture)[1]["pixel_values"]
        return torch.randn(8, *pixels.shape[1:], generator=torch.Generator().manual_seed(0))
    return TOKENS


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """``folders(architecture)``: a saved float model."""
    root = tmp_path_factory.mktemp("models")

    @functools.cache
    def saved(architecture: str) -> Path:
        model, _ = tiny_models.build(architecture)
        model.save_pretrained(root / architecture)
        if architecture not in IMAGES:
            tiny_folder.tokenizer().save_pretrained(root / architecture)
        return root / architecture

    yield saved


@pytest.fixture(scope="module")
def results(folders: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """``results(recipe, architecture)``: what quantizing gave, with its checkpoint on disk."""
    root = tmp_path_factory.mktemp("checkpoints")

    @functools.cache
    def quantized(recipe: str, architecture: str) -> Any:
        out = root / f"{recipe} {architecture}".replace(",", "").replace(" ", "-")
        return dither.quantize(folders(architecture), RECIPES[recipe][0], calibration(architecture), out)

    yield quantized


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file() and f.name != "dither_report.json"}


def test_every_method_is_here() -> None:
    named = {name.partition(" ")[0].partition(",")[0] for name in RECIPES}
    assert set(METHODS) <= named


@each
def test_the_same_bytes_after_a_stop(recipe: str, architecture: str, folders: Any, results: Any, tmp_path: Path) -> None:
    def stop(event: Event) -> None:
        if event.blocks and event.done == 1:
            raise KeyboardInterrupt

    whole = results(recipe, architecture)
    given = (folders(architecture), RECIPES[recipe][0], calibration(architecture), tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        dither.quantize(*given, progress=stop)
    assert not (tmp_path / "out" / "config.json").exists()
    resumed = dither.quantize(*given)
    assert resumed.report.resumed_blocks == 1
    assert contents(tmp_path / "out") == contents(whole.out)


@each
def test_bits_are_the_bytes_on_disk(recipe: str, architecture: str, results: Any) -> None:
    found = results(recipe, architecture)
    names = {row.name for row in found.report.layers}
    stored = 0
    for path in found.out.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - no mapping
                owner = next((n for n in names if key.startswith((f"{n}.", f"{n}_quantized."))), None)
                if owner is not None and not key.endswith(".bias"):
                    tensor = file.get_tensor(key)
                    stored += tensor.numel() * tensor.element_size()
    weights = sum(math.prod(row.shape) for row in found.report.layers)
    assert found.bits_per_weight == pytest.approx(8 * stored / weights, rel=1e-12)


@each
def test_outputs_are_finite_and_near_the_float_ones(recipe: str, architecture: str, results: Any) -> None:
    quantized, _ = dither.load(results(recipe, architecture).out)
    model, sample = tiny_models.build(architecture)
    with torch.no_grad():
        ours, theirs = quantized(**sample).logits, model(**sample).logits
    assert bool(ours.isfinite().all())
    assert float((ours - theirs).norm()) < float(theirs.norm())  # further than nothing at all would be no model


@each
def test_it_is_exported_or_refused_in_one_line(recipe: str, architecture: str, results: Any, tmp_path: Path) -> None:
    try:
        dither.export(results(recipe, architecture).out, tmp_path / "ct")
    except DitherError as refusal:
        assert "\n" not in str(refusal) and len(str(refusal)) > 20
        assert not (tmp_path / "ct" / "config.json").exists()
    else:
        assert (tmp_path / "ct" / "config.json").exists() and list((tmp_path / "ct").glob("*.safetensors"))


@pytest.mark.parametrize("recipe", [name for name, (_, nearest) in RECIPES.items() if nearest is not None])
def test_layers_are_better_than_nearest(recipe: str, results: Any, folders: Any) -> None:
    """On average, at no more bits (codebooks and bit maps count), through the same inputs."""
    ours, theirs = [], []
    for architecture in architectures(recipe):
        found = results(recipe, architecture).report.layers
        plain = {row.name: row for row in nearest_errors(recipe, architecture, folders).layers}
        rows = [row for row in found if row.output_error is not None and not row.fallback]
        assert rows
        ours += [row.output_error for row in rows]
        theirs += [plain[row.name.removesuffix(".layer")].output_error for row in rows]
    assert sum(ours) / len(ours) < sum(theirs) / len(theirs)


@dataclass(frozen=True)
class SeenNearest(Nearest):
    """Rounding to nearest that has the engine gather the inputs, so that errors through them are known."""

    needs: ClassVar[frozenset[str]] = frozenset({HESSIAN})


def nearest_errors(recipe: str, architecture: str, folders: Any) -> Any:
    baseline = RECIPES[recipe][1]
    assert baseline is not None
    plan = replace(as_recipe(baseline), stages=(SeenNearest(),))
    return dither.quantize(folders(architecture), plan, calibration(architecture)).report


REWRITING = [r for r in RECIPES if as_recipe(RECIPES[r][0]).model_stages]


@pytest.mark.parametrize(("recipe", "architecture"), [(r, a) for r in REWRITING for a in architectures(r)])
def test_model_stages_keep_the_float_function(recipe: str, architecture: str) -> None:
    view = view_of(architecture, RECIPES[recipe][0])
    before = output(view)
    for stage in view.recipe.model_stages:
        stage.apply(view)
    assert relative_difference(output(view), before) < 1e-9


class _Enough(Exception):
    """Nothing more is wanted of the run."""


FOLDING = [r for r in RECIPES if as_recipe(RECIPES[r][0]).transforms]


@pytest.mark.parametrize(("recipe", "architecture"), [(r, a) for r in FOLDING for a in architectures(r)])
def test_transforms_keep_the_float_function(recipe: str, architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks as they are behind the transforms, in a run of the engine whose weights are float64, put together again."""
    model, sample = tiny_models.build(architecture)
    model = model.double().requires_grad_(False)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the others know no float64
    randomize(model, torch.Generator().manual_seed(1))
    sample = {k: v.double() if v.is_floating_point() else v for k, v in sample.items()}
    before = run_exactly(model, [((), sample)])
    folded: dict[str, nn.Module] = {}
    fill, settle = models.MemorySource.fill, BlockWork._settle

    def fill_wide(self: Any, *args: Any, **kwargs: Any) -> None:
        fill(self, *args, **kwargs | {"dtype": torch.float64})

    def keep(self: Any, view: BlockView, unit: Unit) -> None:
        folded[unit.name] = copy.deepcopy(view.module)
        if not unit.name:  # handled whole: there is nothing behind it
            raise _Enough
        view.module.float()  # what follows rounds float32
        settle(self, view, unit)

    monkeypatch.setattr(models.MemorySource, "fill", fill_wide)
    monkeypatch.setattr(BlockWork, "_settle", keep)
    with suppress(_Enough):
        dither.quantize(model, RECIPES[recipe][0], calibration(architecture), compute=torch.float64)
    changed = copy.deepcopy(model)
    for name, block in folded.items():
        if name:
            parent, _, own = name.rpartition(".")
            setattr(changed.get_submodule(parent), own, block)
    changed = folded.get("", changed)
    moved = [n for n, p in changed.named_parameters() if n not in model.state_dict() or not torch.equal(p, model.get_parameter(n))]
    assert moved
    assert relative_difference(run_exactly(changed, [((), sample)]), before) < 1e-9
