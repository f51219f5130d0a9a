"""For every architecture: what `discover` proved leaves the float64 function unchanged, and `discover` leaves the model alone."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dither.graph import Site, Structure, apply_scale, apply_shift, discover, random_rotation, rotate_residual
from dither.graph.exact import as_call, exact_calls, float64_default, randomize, relative_difference, run_exactly
from tiny_models import NAMES, build

EXACT = 1e-9


@cache
def known(name: str) -> tuple[nn.Module, Any, Structure]:
    model, sample = build(name)
    return model, sample, discover(model, sample)


def bench(name: str, seed: int) -> tuple[nn.Module, list[Any]]:
    """A float64 copy with other random weights than any that the proofs saw; tied weights stay tied."""
    model, sample, _ = known(name)
    bench = copy.deepcopy(model).double().requires_grad_(False)
    if hasattr(bench, "config"):
        bench.config.use_cache = False
        bench.config._experts_implementation = "eager"  # the batched kernels take no float64
    randomize(bench, torch.Generator().manual_seed(1000 + seed))
    return bench, exact_calls([as_call(sample)])


def fold(model: nn.Module, site: Site, seed: int) -> None:
    draw = torch.rand(site.channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if site.kind == "scale":
        apply_scale(model, site, 0.5 + 1.5 * draw)
    else:
        apply_shift(model, site, 2 * draw - 1)


def outputs(model: nn.Module, calls: list[Any]) -> list[Tensor]:
    with float64_default():
        return run_exactly(model, calls)


@pytest.mark.parametrize("kind", ["scale", "shift"])
@pytest.mark.parametrize("name", NAMES)
def test_each_site_alone_and_all_together_change_nothing(name: str, kind: str) -> None:
    _, _, structure = known(name)
    model, calls = bench(name, 0)
    before = outputs(model, calls)
    assert all(bool(torch.isfinite(t).all()) for t in before)
    sites = [s for s in structure.sites if s.kind == kind]
    assert sites or kind == "shift"
    together = copy.deepcopy(model)
    for i, site in enumerate(sites):
        alone = copy.deepcopy(model)
        fold(alone, site, i)
        assert relative_difference(outputs(alone, calls), before) < EXACT, str(site)
        fold(together, site, i)
    assert relative_difference(outputs(together, calls), before) < EXACT


@pytest.mark.parametrize("name", NAMES)
def test_folding_really_changes_the_weights_it_names(name: str) -> None:
    _, _, structure = known(name)
    model, _ = bench(name, 1)
    for i, site in enumerate(s for s in structure.sites if s.kind == "scale"):
        names = [site.producer.parameter, *(c.parameter for c in site.consumers)]
        before = [model.get_parameter(n).clone() for n in names]
        fold(model, site, i)
        assert all(not torch.equal(model.get_parameter(n), b) for n, b in zip(names, before, strict=True)), str(site)


ROTATED = {
    "llama",
    "llama-tied",
    "mistral",
    "qwen2",
    "qwen3",
    "phi3",
    "granite",
    "stablelm",
    "mixtral",
    "qwen2-moe",
    "qwen3-moe",
    "gpt-oss",
    "gpt2",
    "gpt-neox",
    "opt",
    "falcon",
    "falcon-new",
    "mamba",
    "mamba2",
    "vit",
    "swin",
    "t5",
    "whisper",
}  # the other architectures normalise after adding, or before the first block, or have no stream


@pytest.mark.parametrize("name", NAMES)
def test_rotating_a_proved_stream_changes_nothing(name: str) -> None:
    _, _, structure = known(name)
    assert bool(structure.residuals) == (name in ROTATED)
    for stream in structure.residuals:
        model, calls = bench(name, 2)
        before = outputs(model, calls)
        rotate_residual(model, stream, random_rotation(stream, seed=5))
        assert relative_difference(outputs(model, calls), before) < EXACT
        assert all(site.producer.outputs == stream.width for site in stream.norms)


def test_rotation_and_scales_and_shifts_compose() -> None:
    for name in ("llama-tied", "opt", "mixtral"):
        _, _, structure = known(name)
        model, calls = bench(name, 3)
        before = outputs(model, calls)
        assert structure.residual is not None
        for i, site in enumerate(structure.sites):
            fold(model, site, i)
        rotate_residual(model, structure.residual, random_rotation(structure.residual, seed=6))
        assert relative_difference(outputs(model, calls), before) < EXACT


@pytest.mark.parametrize("name", ["llama-tied", "mixtral", "gpt2", "whisper"])
def test_discover_leaves_model_and_random_state_alone(name: str) -> None:
    model, sample = build(name)
    model.train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    trained = [p.requires_grad for p in model.parameters()]
    config = copy.deepcopy(model.config.to_dict())
    state = torch.get_rng_state()
    discover(model, sample)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() == torch.float32
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == trained
    assert model.training and model.config.to_dict() == config


@pytest.mark.parametrize("name", ["llama", "mixtral", "opt"])
def test_discover_is_deterministic(name: str) -> None:
    model, sample, first = known(name)
    second = discover(model, sample)
    assert second.summary() == first.summary()
    assert second.layers == first.layers
    for a, b in zip(first.sites, second.sites, strict=True):
        assert torch.equal(a.producer.rows, b.producer.rows)
        assert all(torch.equal(x.channel_map, y.channel_map) for x, y in zip(a.consumers, b.consumers, strict=True))


@pytest.mark.parametrize("name", ["llama", "opt", "mixtral", "mamba"])
def test_real_weights_in_float32_stay_close(name: str) -> None:
    model, sample, structure = known(name)
    folded = copy.deepcopy(model)
    for i, site in enumerate(structure.sites):
        if site.kind == "scale":
            fold(folded, site, i)
    with torch.no_grad():
        a, b = folded(**sample).logits, model(**sample).logits
    assert relative_difference([a.double()], [b.double()]) < 1e-4
