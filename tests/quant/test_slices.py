"""Layers whose rows fall into slices with inputs of their own: each expert, and each group of a convolution, is a rounding problem by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dither
import tiny_models
from dither.formats import Int, group, tile
from dither.graph import discover
from dither.quant import block
from dither.quant.experts import opened
from dither.quant.recipe import Chain
from dither.quant.recipes import AWQ, GPTQ, RTN, VPTQ, FlexRound
from dither.quant.rounding.columns import columns
from dither.quant.statistics import slice_inputs
from rewriting import TOKENS

MOE = ["mixtral", "qwen2-moe", "qwen3-moe", "gpt-oss"]


class Grouped(nn.Module):
    """A residual block around a grouped convolution over a line."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(16, 24, 3, groups=4, padding=1)
        self.out = nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.conv(x.transpose(1, 2)).transpose(1, 2).relu())
        return x + y


def line() -> Tensor:
    """Sequences whose channels differ in size and hang together, so that Hessians matter."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(16, 16, generator=generator) * torch.logspace(-1, 0.5, 16)
    return (torch.randn(40, 12, 16, generator=generator) @ mix).cumsum(1)


@pytest.mark.parametrize("make", [nn.Conv1d, nn.Conv2d])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_slices_of_a_convolution_are_its_groups(make: Any, groups: int) -> None:
    conv = make(6, 12, 3, groups=groups, padding=1, stride=2, padding_mode="reflect", bias=False)
    x = torch.randn(2, 6, 9) if make is nn.Conv1d else torch.randn(2, 6, 9, 8)
    slices = slice_inputs(conv, x, None)
    weights = conv.weight.flatten(1).chunk(groups)
    assert len(slices) == groups
    found = torch.cat([rows @ w.T for rows, w in zip(slices, weights, strict=True)], 1)
    assert torch.allclose(found, conv(x).flatten(2).transpose(1, 2).flatten(0, 1), atol=1e-5)


def test_each_group_of_a_convolution_is_a_problem_of_its_own() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(Grouped(), Grouped()), line()
    scheme = Int(3) @ group(12)
    result = dither.quantize(net, GPTQ(bits=3, group=12), {"input": x}, compute=torch.float32)
    conv = net[0].conv
    expected = []
    for rows, weight in zip(slice_inputs(conv, x.transpose(1, 2), None), conv.weight.detach().flatten(1).chunk(4), strict=True):
        rows = rows.double()
        expected.append(columns(weight, rows.T @ rows / len(rows), scheme).dequantize())
    assert torch.equal(result.model.get_submodule("0.conv").weight.flatten(1), torch.cat(expected))
    row = next(row for row in result.report.layers if row.name == "0.conv")
    assert row.facts == {"slices": 4} and row.fallback is None and row.tokens == 40 * 12


@pytest.mark.parametrize("method", [GPTQ(bits=3, group=8), GPTQ(bits=3, group=8, clip="output"), FlexRound(bits=3, group=8, level="layer", steps=60)])
def test_groups_of_a_convolution_lose_less_than_rounded_to_nearest(method: Any) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(Grouped(), Grouped()), {"input": line()}
    nearest = dither.quantize(net, RTN(bits=3, group=8), x, compute=torch.float32)
    result = dither.quantize(net, method, x, compute=torch.float32)

    def error(model: nn.Module) -> float:
        seen = {}
        with torch.no_grad():
            handle = net[0].conv.register_forward_hook(lambda _m, args, out: seen.update(x=args[0], y=out))
            net(x["input"])
            handle.remove()
            y = F.conv1d(seen["x"], model.get_submodule("0.conv").weight, net[0].conv.bias, padding=1, groups=4)
            return float((y - seen["y"]).square().sum())

    assert error(result.model) < 0.7 * error(nearest.model)
    assert result.bits_per_weight == nearest.bits_per_weight


MANY = [AWQ(bits=4, group=8), FlexRound(bits=4, group=8, steps=8), VPTQ(centroids=16, kmeans_iters=3), Chain(AWQ(bits=4, round=False), GPTQ(bits=4))]


@pytest.mark.parametrize("method", MANY)
@pytest.mark.parametrize("groups", [1, 4, 16])
def test_every_kind_of_recipe_takes_convolutions(method: Any, groups: int) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=groups, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 1), nn.Flatten()
    )
    x = torch.randn(24, 3, 6, 6)
    result = dither.quantize(net, method, {"input": x}, compute=torch.float32)
    with torch.no_grad():
        truth, found = net(x), result.model(x)
    assert len(result.report.layers) == 2  # the last one is a head
    assert float((found - truth).square().mean()) < 0.5 * float(truth.square().mean())


# -- experts ------------------------------------------------------------------------------------------------------------------


def block_of(name: str) -> tuple[nn.Module, Any, list[Any]]:
    """The first block that has experts, its structure, and the stacks in it."""
    model, sample = tiny_models.build(name)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    structure = discover(model, sample)
    return model, structure, [layer for layer in structure.layers if layer.kind == "experts"]


@pytest.mark.parametrize("name", MOE)
def test_experts_show_what_they_read(name: str) -> None:
    """The rows seen by hooks, multiplied with each expert's matrix, are the products that the model makes; and nothing else changes."""
    model, _, stacks = block_of(name)
    model.requires_grad_(False)
    before = model(TOKENS)[0]
    seen: dict[tuple[str, int], list[Tensor]] = {}
    with opened(model, stacks, lambda: None) as experts:
        for stack, modules in experts.items():
            for e, module in enumerate(modules):
                module.register_forward_pre_hook(lambda _m, args, key=(stack, e): seen.setdefault(key, []).append(args[0].clone()))
        assert torch.equal(model(TOKENS)[0], before)
    assert torch.equal(model(TOKENS)[0], before)
    made: list[Tensor] = []  # what F.linear and matmul made of slices of the stacks, recorded without `opened`
    owned = {layer.parameter: model.get_parameter(layer.parameter) for layer in stacks}

    class Record(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if func in (F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__):
                memory = args[1].untyped_storage().data_ptr()
                if any(memory == p.untyped_storage().data_ptr() for p in owned.values()):
                    made.append(args[0].clone())
            return out

    with Record():
        model(TOKENS)
    assert sum(len(v) for v in seen.values()) == len(made) > 0
    calls = sorted((tuple(x.shape), float(x.sum())) for rows in seen.values() for x in rows)
    assert calls == sorted((tuple(x.shape), float(x.sum())) for x in made)
    assert all(model.get_parameter(n) is p for n, p in owned.items())


@pytest.mark.parametrize("name", MOE)
def test_gptq_rounds_each_expert_on_its_own_tokens(name: str) -> None:
    model, structure, stacks = block_of(name)
    first = stacks[0]
    batch = torch.randint(3, tiny_models.VOCABULARY, (24, 32), generator=torch.Generator().manual_seed(1))
    scheme = Int(3) @ group(16)
    skip = tuple(layer.name for layer in structure.layers if layer.name != first.name)  # so that its inputs are the float model's
    result = dither.quantize(model, GPTQ(bits=3, group=16, skip=skip), batch, compute=torch.float32)
    rows: dict[int, list[Tensor]] = {}
    with torch.no_grad(), opened(model, [first], lambda: None) as experts:
        for e, module in enumerate(experts[first.name]):
            module.register_forward_pre_hook(lambda _m, args, e=e: rows.setdefault(e, []).append(args[0].double()))
        model(batch)
    owner, _, leaf = first.parameter.rpartition(".")
    stored = getattr(result.model.get_submodule(owner), leaf).detach()
    matrices = stored.mT if first.swapped else stored
    original = first.matrix(model).detach()
    assert len(result.report.layers) == 1 and len(rows) > 1
    for e, found in rows.items():
        x = torch.cat(found)
        if len(x) >= 32:
            expected = columns(original[e].contiguous(), x.T @ x / len(x), scheme).dequantize()
            assert float((matrices[e] - expected).abs().max()) <= 1e-6 or float((matrices[e] != expected).float().mean()) < 0.01
    report = result.report.layers[0]
    assert report.facts == {"slices": len(original)} and report.output_error is not None


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_padding_never_reaches_an_expert(name: str) -> None:
    model, _, _ = block_of(name)
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, tiny_models.VOCABULARY, (12, 30), generator=generator)
    lengths = torch.randint(12, 31, (12,), generator=generator)
    mask = (torch.arange(30) < lengths[:, None]).long()

    def tokens(fill: int) -> list[int]:
        padded = torch.where(mask.bool(), ids, torch.full_like(ids, fill))
        result = dither.quantize(model, GPTQ(bits=3, group=16), [{"input_ids": padded, "attention_mask": mask}], compute=torch.float32)
        digests.append(torch.cat([p.double().flatten() for p in map(torch.as_tensor, result.model.state_dict().values())]))
        return [row.tokens for row in result.report.layers if row.facts.get("slices")]

    digests: list[Tensor] = []
    first, second = tokens(5), tokens(77)
    assert first == second and torch.equal(digests[0], digests[1])
    experts, top = model.config.num_local_experts if name == "mixtral" else model.config.num_experts, model.config.num_experts_per_tok
    assert first and all(n == int(mask.sum()) * top // experts for n in first)


def test_what_cannot_be_rounded_apart_says_so() -> None:
    model, _, _ = block_of("mixtral")
    result = dither.quantize(model, GPTQ(weights=Int(4) @ tile(8, 16)), TOKENS)
    rows = [row for row in result.report.layers if "experts" in row.name]
    assert rows and all("does not let its slices" in (row.fallback or "") for row in rows)


def test_an_expert_without_tokens_is_rounded_to_nearest() -> None:
    model, _, _ = block_of("mixtral")
    gate = next(p for n, p in model.named_parameters() if n.endswith("gate.weight"))
    with torch.no_grad():
        gate.zero_()
        gate[:2, 0] = 1e3  # whatever the sign of channel 0, the two are first, or behind the others
        gate[2:, 0] = torch.tensor([-1e3, -1e3])
    result = dither.quantize(model, GPTQ(bits=3, group=16), TOKENS[:, :20])
    layer = next(row for row in result.report.layers if "experts" in row.name)
    assert layer.fallback is None or "calibration tokens" in layer.fallback
    with torch.no_grad():
        assert bool(torch.isfinite(result.model(TOKENS)[0]).all())


def test_the_float_pass_bounds_what_it_holds_of_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, _ = block_of("mixtral")
    plain = dither.quantize(model, AWQ(bits=4, group=16), TOKENS)
    assert not any("not gathered" in note for note in plain.report.notes)
    monkeypatch.setattr(block, "MOST_OF_EXPERTS", 1000)
    bounded = dither.quantize(model, AWQ(bits=4, group=16), TOKENS)
    assert any("not gathered" in note for note in bounded.report.notes)
    rows = {row.name: row.tokens for row in bounded.report.layers}
    assert all(tokens == 0 for name, tokens in rows.items() if "experts" in name) and any(rows.values())
    chained = Chain(AWQ(bits=4, group=16, round=False), GPTQ(bits=4, group=16))
    rounded = dither.quantize(model, chained, TOKENS)
    assert all(row.tokens > 0 for row in rounded.report.layers)  # the rounded pass takes experts one by one
