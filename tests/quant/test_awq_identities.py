"""Exact identities of AWQ (Lin et al., MLSys 2024): scaling leaves the float function alone, no scaling is RTN, no site gets worse than that,
the closed form, the clipping error by Gram matrices, and channels that are never active.

The search is held against one written here from the paper's code: plain loops over hooks of the float model.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dither
import tiny_models
from dither import graph
from dither.formats import Clip, Float, Int, Scheme, channel, clip, group
from dither.quant.parts import BlockView
from dither.quant.recipes import AWQ, RTN
from dither.quant.statistics import HESSIAN, MEAN_ABS, ROWS, Statistics
from dither.quant.transforms import fold as transforms
from dither.quant.transforms.scale import ScaleSearch, candidate
from dither.quant.walker import Call

TOKENS = torch.randint(3, tiny_models.VOCABULARY, (8, 24), generator=torch.Generator().manual_seed(0))
SCHEME = Int(3) @ group(16)


def with_outliers(name: str = "llama") -> nn.Module:
    """A tiny model in which some channels are much more active than the others, so that scaling pays."""
    model, _ = tiny_models.build(name)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if n.endswith("layernorm.weight"):
                p[torch.randperm(len(p), generator=draw)[:3]] *= 20
    return model.float()


def same_state(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


# -- (1) the float function stays the same -----------------------------------------------------------------------------


@torch.no_grad()
def outputs(model: nn.Module, blocks: list[str]) -> dict[str, Tensor]:
    """What each block returns, and the logits; ``model`` runs in float64."""
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the others know no float64
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, args, out: found.update({name: out if isinstance(out, Tensor) else out[0]})

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in blocks]
    found["logits"] = model(input_ids=TOKENS, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "opt", "qwen2"])
def test_the_chosen_scales_leave_the_float_function_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scales of a float32 run, folded into a float64 twin: all blocks return the same, and so does the model."""
    model = with_outliers(name)
    twin = copy.deepcopy(model).double()
    applied, folded, blocks = ScaleSearch.apply, [], []

    def apply(self: ScaleSearch, block: BlockView) -> None:
        blocks.append(block.name)

        def both(module: nn.Module, site: graph.Site, scale: Tensor) -> None:
            assert module is block.module
            folded.append(scale)
            for place in (module, twin.get_submodule(block.name)):
                graph.apply_scale(place, site, scale)

        with monkeypatch.context() as patched:
            patched.setattr(transforms, "apply_scale", both)
            applied(self, block)

    monkeypatch.setattr(ScaleSearch, "apply", apply)
    sites = dither.quantize(model, AWQ(weights=SCHEME, clip=False, gqa=True), TOKENS, compute=torch.float32).report.sites
    assert len(blocks) == 2 and len(folded) == sum(site["r"] > 0 for site in sites) > 2
    assert max(float(scale.max() / scale.min()) for scale in folded) > 1.3 and not same_state(model.double(), twin)
    before, after = outputs(model.double(), blocks), outputs(twin, blocks)
    assert len(before) == 3 and all(float((before[k] - after[k]).abs().max()) < 1e-9 for k in before)


# -- (2) r = 0 is RTN --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "opt"])
def test_no_scaling_is_rtn_to_the_last_bit(name: str) -> None:
    model = with_outliers(name)
    plain = dither.quantize(model, RTN(weights=SCHEME), TOKENS)
    searched = dither.quantize(model, AWQ(weights=SCHEME, grid=1, clip=False), TOKENS)
    assert searched.report.sites and all(site["r"] == 0 for site in searched.report.sites)
    assert same_state(plain.model, searched.model)


def two_layers(weight: Tensor, x: Tensor, scheme: Any) -> BlockView:
    """A layer that hands ``x [T, I]`` on, and the reader ``weight [O, I]``, of which only the reader is to be quantized."""
    outputs, inputs = weight.shape
    block = nn.Sequential(nn.Linear(inputs, inputs, bias=False), nn.Linear(inputs, outputs, bias=False))
    with torch.no_grad():
        block[0].weight.copy_(torch.eye(inputs))
        block[1].weight.copy_(weight)
    structure = graph.discover_block(block, [((torch.randn(8, inputs),), {})])
    seen = Statistics(inputs, frozenset({MEAN_ABS, ROWS}))
    seen.update(x)
    calls = {"1": [Call((x,), {})]}
    return BlockView(0, "block", block, structure, {"1": seen}, {"1": scheme}, torch.float32, calls)


def search(block: BlockView, grid: int = 20) -> tuple[Tensor, dict[str, Any]]:
    """The one site of `two_layers`."""
    (site,) = [s for s in block.structure.sites if s.kind == "scale"]
    return ScaleSearch(grid=grid).search(block, site, list(site.consumers))


def test_equal_activity_leaves_rtn_alone() -> None:
    """Where all channels are equally active every exponent gives s = 1 and the same loss: the first of them is no scaling."""
    signs = torch.randint(0, 2, (64, 32), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    weight = torch.randn(24, 32, generator=torch.Generator().manual_seed(1))
    scale, found = search(two_layers(weight, signs, SCHEME))
    rtn = float((signs @ (SCHEME.quantize(weight) - weight).T).square().mean())
    assert found["r"] == 0 and torch.equal(scale, torch.ones(32))
    assert found["loss"] == found["loss_at_r0"] == pytest.approx(rtn, rel=1e-4)


# -- (3) no site gets worse, and each gets what the paper's search gives ----------------------------------------------------


MAPPINGS = {  # the module f by whose output a site is judged, and the layers that read the site
    "self_attn": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "mlp": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.down_proj": ["mlp.down_proj"],
}


@torch.no_grad()
def paper(model: nn.Module, scope: str, readers: list[str]) -> list[float]:
    """The loss at r = 0, 1/20 ... 19/20, as llm-awq's ``auto_scale`` does it."""
    f, layers = model.get_submodule(scope), [model.get_submodule(name) for name in readers]
    kept: dict[str, Any] = {}
    hooks = [
        f.register_forward_pre_hook(lambda m, a, k: kept.update(args=a, kwargs=k), with_kwargs=True),
        layers[0].register_forward_pre_hook(lambda m, a: kept.update(x=a[0])),
    ]
    model(input_ids=TOKENS, use_cache=False)
    for hook in hooks:
        hook.remove()

    def output() -> Tensor:
        y = f(*kept["args"], **kept["kwargs"])
        return y[0] if isinstance(y, tuple) else y

    a, reference = kept["x"].abs().flatten(0, 1).mean(0), output()
    weights = [layer.weight.clone() for layer in layers]
    losses = []
    for i in range(20):
        s = a.pow(i / 20).clamp(min=1e-4)
        s = s / (s.max() * s.min()).sqrt()
        for layer, weight in zip(layers, weights, strict=True):
            layer.weight.copy_(SCHEME.quantize(weight * s) / s)
        losses.append(float((output() - reference).square().mean()))
        for layer, weight in zip(layers, weights, strict=True):
            layer.weight.copy_(weight)
    return losses


def test_every_mapping_gets_what_the_paper_searches() -> None:
    model = with_outliers()
    sites = dither.quantize(model, AWQ(weights=SCHEME, clip=False), TOKENS, compute=torch.float32).report.sites
    scaled = 0
    for i, (scope, readers) in itertools.product(range(2), MAPPINGS.items()):
        name = f"model.layers.{i}"
        (site,) = [
            s for s in sites if s["site"].startswith(f"{name}: ") and s["site"].endswith("-> " + ", ".join(readers))
        ]
        losses = paper(model, f"{name}.{scope}", [f"{name}.{reader}" for reader in readers])
        assert site["loss_at_r0"] == pytest.approx(losses[0], rel=1e-3)
        assert site["loss"] == pytest.approx(min(losses), rel=1e-3)
        assert losses[round(20 * site["r"])] == pytest.approx(min(losses), rel=1e-3)
        assert site["scale_min"] * site["scale_max"] == pytest.approx(1)
        scaled += site["r"] > 0
    assert len(sites) == 6 and scaled >= 4


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "opt", "phi3"])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
def test_no_mapping_gets_worse(name: str, compute: torch.dtype) -> None:
    recipe = AWQ(weights=SCHEME, clip=False, gqa=True)
    sites = dither.quantize(with_outliers(name), recipe, TOKENS, compute=compute).report.sites
    assert sites and all(site["loss"] <= site["loss_at_r0"] for site in sites)
    assert any(site["loss"] < site["loss_at_r0"] for site in sites)


# -- (4) closed form -----------------------------------------------------------------------------------------------------


def salient(s: float, largest: float) -> float:
    """Error of a scaled group over that of the plain one, as the search reports it (root of the mean square).

    One group a row: all weights are 1 (a point of the grid, so without error) but that of the salient channel, which is drawn from
    (0, ``largest``). With the activities 1 and ``s^2``, the exponents 0 and 1/2 give no scaling, and a salient scale ``s`` times the others'.
    """
    draw = torch.Generator().manual_seed(0)
    weight = torch.ones(4096, 16)
    weight[:, 5] = torch.rand(4096, generator=draw) * largest
    x = torch.ones(4, 16)
    x[:, 5] = s * s
    scale, found = search(two_layers(weight, x, Int(4, scale="float32") @ channel()), grid=2)
    assert found["r"] == 0.5 and torch.allclose(scale[5] / scale, torch.where(torch.arange(16) == 5, 1.0, s))
    return float((found["loss"] / found["loss_at_r0"]) ** 0.5)


@pytest.mark.parametrize("s", [2.0, 4.0, 8.0])
def test_a_salient_channel_loses_its_scale_in_error(s: float) -> None:
    """Below the group's largest weight nothing else moves: the channel is rounded in the same steps, then divided by s."""
    assert salient(s, 1 / s) == pytest.approx(1 / s, rel=0.05)


def test_beyond_the_largest_weight_the_steps_grow_and_the_gain_ends() -> None:
    assert salient(8.0, 1.0) > 3 / 8


# -- (6) without rounding there is nothing to gain ----------------------------------------------------------------------------


class Exact:
    """A scheme that rounds nothing, as one of very many bits would."""

    def quantize(self, weight: Tensor) -> Tensor:
        return weight


@pytest.mark.parametrize("kind", ["stub", "weights on the grid"])
def test_without_error_nothing_is_scaled(kind: str) -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(64, 32, generator=draw) * torch.logspace(-1, 2, 32)
    weight = torch.randn(24, 32, generator=draw)
    scheme: Any = Exact()
    if kind != "stub":  # steps of 1/64, each row with the codes 0 and 255
        weight = torch.randint(0, 256, (24, 32), generator=draw).float()
        weight[:, 0], weight[:, 1] = 0, 255
        weight = (weight - 100) / 64
        scheme = Int(8) @ channel()
        assert torch.equal(scheme.quantize(weight), weight)
    scale, found = search(two_layers(weight, x, scheme))
    assert found["r"] == 0 and found["loss"] == 0 and torch.equal(scale, torch.ones(32))


def test_without_error_no_mapping_of_a_model_is_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_outliers()
    recipe = AWQ(weights=Int(8) @ group(16), clip=False)
    assert any(site["r"] > 0 for site in dither.quantize(model, recipe, TOKENS).report.sites)
    monkeypatch.setattr(Scheme, "quantize", lambda self, w, params=None: w)
    sites = dither.quantize(model, recipe, TOKENS).report.sites
    assert sites and all(site["r"] == 0 and site["loss"] == 0 for site in sites)


# -- (5) the clipping error through the output ----------------------------------------------------------------------------


@pytest.mark.parametrize("needs", [ROWS, HESSIAN])
@pytest.mark.parametrize("size", [16, 12, 40])
@pytest.mark.parametrize("fmt", [Int(3), Int(2, sym="full"), Int(4, zero="float"), Float(2, 1)], ids=str)
def test_the_gram_form_is_the_direct_form(fmt: Int | Float, size: int, needs: str) -> None:
    """``d^T G d = mean_t (d . x_t)^2`` for each row and group, the shorter last group among them, at every range that is tried."""
    draw = torch.Generator().manual_seed(0)
    w = torch.randn(9, 40, generator=draw) ** 3
    x = torch.randn(300, 40, generator=draw) @ torch.randn(40, 40, generator=draw) + 2  # correlated, not centred
    seen = Statistics(40, frozenset({needs}))
    seen.update(x)
    grams, first = seen.gram_blocks(size), 0
    for gram in grams:
        count, n = gram.shape[:2]
        blocks, rows = (t[:, first : first + count * n].reshape(len(t), count, n) for t in (w, x))
        first += count * n
        error = clip._error(blocks, 2, None, gram)
        for params in clip._candidates(blocks, fmt, Clip(p=2, grid=20, shrink=0.5), {}):
            d = fmt.quantize(blocks, params) - blocks
            direct = torch.einsum("ogn,tgn->tog", d.double(), rows.double()).square().mean(0)
            torch.testing.assert_close(error(d).double(), direct, rtol=1e-5, atol=1e-5 * float(direct.max()))
    assert first == 40


# -- (7) channels without activity, losses without a number ----------------------------------------------------------------


@pytest.mark.parametrize("r", [0.0, 0.05, 0.5, 0.95])
def test_a_channel_without_activity_keeps_its_scale(r: float) -> None:
    a = torch.tensor([0.0, 4.0, 1e-30, 0.0, 0.25, 1e20])
    s, live = candidate(a, r), a > 0
    assert torch.equal(s[~live], torch.ones(2)) and bool((torch.isfinite(s) & (s > 0)).all())
    assert float(s[live].max() * s[live].min()) == pytest.approx(1)
    wanted = (a[live].double().pow(r) if r else torch.ones(4).double()).clamp(min=1e-4)
    assert torch.allclose((s[live] / s[1]).double(), wanted / wanted[0], rtol=1e-5)
    assert torch.equal(candidate(torch.zeros(3), r), torch.ones(3))


def test_dead_inputs_and_columns_of_zeros_keep_their_scale() -> None:
    """Whatever they would be, the others are scaled as if those were not there."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 32, generator=draw)
    x = torch.randn(128, 32, generator=draw) * torch.logspace(-1, 1, 32)
    x[:, 3], weight[:, 7], x[:, 7], kept = 0, 0, 1e6, [i for i in range(32) if i not in (3, 7)]
    scale, found = search(two_layers(weight, x, Int(3) @ channel()))
    assert found["r"] > 0 and found["loss"] < found["loss_at_r0"]
    assert float(scale[3]) == float(scale[7]) == 1
    a = x[:, kept].abs().mean(0).pow(found["r"])
    assert torch.allclose(scale[kept], a / (a.max() * a.min()).sqrt(), rtol=1e-4)


@pytest.mark.parametrize("calls", [1, 12])
def test_no_finite_loss_names_the_site_for_real(calls: int) -> None:
    """Inputs and weights are finite, their products are not; judged at once, and with a first look at a part of the tokens."""
    view = two_layers(torch.full((24, 32), 1e30), torch.full((64, 32), 1e15), SCHEME)
    view.search_calls["1"] *= calls
    with pytest.raises(FloatingPointError, match=r"^block: no exponent gives a finite loss at the site .*\b0 -> 1\b"):
        search(view)
