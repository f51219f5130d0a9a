"""LLM-FP4: the search against brute force, the pre-shifted exponents against their formulas, and the method on whole models."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dither
import tiny_folder
import tiny_models
from dither.errors import UsageError
from dither.formats import Clip, Float, Int, Scheme, channel, group
from dither.quant.checkpoint import load
from dither.quant.inputs import InputQuant
from dither.quant.linear import QuantLinear
from dither.quant.parts import Rounded, Task
from dither.quant.recipe import Chain
from dither.quant.recipes import AWQ, GPTQ, LLMFP4, build, knobs
from dither.quant.rounding.fp4 import (
    FormatSearch,
    bias_of,
    chosen_formats,
    float_format,
    preshift,
    scale_of,
    search_formats,
)
from dither.quant.statistics import HESSIAN, MAX_ABS, ROWS, Statistics

TOKENS = torch.randint(3, tiny_models.VOCABULARY, (6, 20), generator=torch.Generator().manual_seed(0))
QUICK = {"candidates": 9, "rounds": 2}
E2M1 = float_format("e2m1", "float32")


def problem(tokens: int = 64, inputs: int = 24, outputs: int = 10, seed: int = 0, spread: float = 1.5) -> tuple[Tensor, Tensor]:
    """Inputs whose channels differ in size, and weights."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, inputs, generator=g) * torch.exp(spread * torch.randn(inputs, generator=g))
    return x, torch.randn(outputs, inputs, generator=g) / 5


def seen(x: Tensor, *more: str) -> Statistics:
    found = Statistics(x.shape[1], frozenset({ROWS, MAX_ABS, *more}))
    found.update(x)
    return found


def searched(part: FormatSearch, x: Tensor, *weights: Tensor, scheme: Scheme | None = None) -> list[Rounded]:
    scheme = scheme or E2M1 @ channel()
    needs = (HESSIAN,) if part.codes == "columns" else ()
    return part.round_together([Task(w, scheme, scheme.fit(w)) for w in weights], seen(x, *needs))


def rounded_inputs(inputs: InputQuant | None, x: Tensor) -> Tensor:
    return x if inputs is None else inputs.module()(x)


def error(x: Tensor, w: Tensor, found: Rounded) -> float:
    """||X_hat W_hat^T - X W^T||^2 / ||X W^T||^2 in float64, from what is stored."""
    target = x.double() @ w.double().T
    x_hat, w_hat = rounded_inputs(found.inputs, x), found.tensor.dequantize()
    return float((x_hat.double() @ w_hat.double().T - target).square().sum() / target.square().sum())


# -- formats and biases ---------------------------------------------------------------------------------------------------


def test_lists_of_formats() -> None:
    assert [f.mantissa for f in search_formats(4)] == [0, 1, 2] and [f.mantissa for f in search_formats(8)] == [2, 3, 4, 5, 6]
    assert all(f.bits == n and not (f.nan and n == 8) for n in range(2, 9) for f in search_formats(n))
    assert str(chosen_formats("search", 4)[0]) == "e2m1" and str(chosen_formats("start", 8)[0]) == "e4m3 without NaN"
    for wrong in ("int4", "e9m9", "e0m3"):
        with pytest.raises(ValueError, match=r"format|float"):
            chosen_formats(wrong, 4)
    with pytest.raises(ValueError, match="e3m2 has 6 bits, not 4"):
        chosen_formats("e3m2", 4)


@pytest.mark.parametrize("fmt", [*search_formats(4), *search_formats(8)], ids=str)
def test_bias_and_scale_are_two_names_of_one_thing(fmt: Float) -> None:
    peak = torch.tensor([0.013, 1.0, 6.0, 311.0])
    bias = bias_of(fmt, peak)
    top = (2 - 2.0**-fmt.mantissa) * torch.exp2(2**fmt.exponent - 1 - bias)  # the paper's maxval(b)
    torch.testing.assert_close(top, peak.double(), rtol=1e-12, atol=0)
    torch.testing.assert_close(scale_of(fmt, bias) * fmt.largest, peak.double(), rtol=1e-12, atol=0)
    if (fmt.exponent, fmt.mantissa) == (2, 1):
        assert abs(float(bias[2]) - 1) < 1e-12


@pytest.mark.parametrize("fmt", [*search_formats(4), float_format("e4m3")], ids=str)
def test_shifts_are_the_papers(fmt: Float) -> None:
    peaks = torch.tensor([8.0, 7.0, 3.9, 1.0, 0.3, 0.001, 0.0, 5.7])
    beta = preshift(fmt, peaks)
    bias = bias_of(fmt, peaks)
    rho, reach = bias.min(), 2**fmt.exponent - 1
    wanted = bias.round().clamp(rho.round(), rho.round() + reach) - rho.round()
    assert beta.dtype == torch.int8 and beta.tolist() == wanted.tolist()
    assert int(beta[0]) == 0 and int(beta[6]) == reach and int(beta.min()) >= 0 and int(beta.max()) <= reach
    # together the two roundings clip a channel to no less than half its maximum
    lifted = peaks * torch.exp2(beta.float())
    assert bool((lifted <= 2 * peaks.max()).all())
    assert preshift(fmt, torch.zeros(3)).tolist() == [reach] * 3


# -- folding --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_folding_the_shift_changes_no_bit(dtype: torch.dtype) -> None:
    """A norm takes 2^beta, the weights 2^-beta: float outputs are the same to the bit, and what the input quantizer then sees, with one
    scale a tensor, is what the emulation rounds."""
    x, w = (t.to(dtype) for t in problem())
    gain = torch.rand(x.shape[1], dtype=dtype) + 0.5
    beta = preshift(E2M1, (x * gain).abs().amax(0))
    up = torch.exp2(beta.to(dtype))
    assert int(beta.max()) > 0
    norm, folded = x * gain, x * (gain * up)
    quant = InputQuant(E2M1 @ dither.formats.tensor(), {"scale": torch.tensor([[0.37]])}, beta)
    plain = InputQuant(E2M1 @ dither.formats.tensor(), {"scale": torch.tensor([[0.37]])})
    assert torch.equal(quant.module()(norm) * up, plain.module()(folded))
    w_hat = (E2M1 @ channel()).quantize(w)
    shifted = w_hat / up
    products = folded[:, None, :] * shifted, norm[:, None, :] * w_hat
    assert torch.equal(*products)  # every term of every inner product
    emulated = quant.module()(norm)[:, None, :] * w_hat
    assert torch.equal(plain.module()(folded)[:, None, :] * shifted, emulated)


# -- the search -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [8, 200])  # judged by rows, and by the Gram matrix
@pytest.mark.parametrize("shift", [False, True])
def test_one_round_is_the_exhaustive_search(tokens: int, shift: bool) -> None:
    """Step 1 against every channel's output error, step 2 against the layer's, both computed directly in float64."""
    x, w = problem(tokens)
    part = FormatSearch(act_formats="e2m1", formats=False, rounds=1, grid=(0.2, 1.0, 9), shortlist=None, preshift=shift)
    found = searched(part, x, w)[0]
    assert found.inputs is not None and found.inputs.params is not None

    peaks = x.abs().amax(0)
    beta = preshift(E2M1, peaks) if shift else None
    top = peaks.max() / 6

    def x_hat(scale: Tensor) -> Tensor:
        return InputQuant(E2M1 @ dither.formats.tensor(), {"scale": scale.view(1, 1)}, beta).module()(x).double()

    y = x.double() @ w.double().T
    start = w.abs().amax(1) / 6
    parts = torch.linspace(0.2, 1.0, 9)
    costs = []
    for part_ in parts:
        scale = (start * part_)[:, None]
        costs.append((x_hat(top) @ (E2M1.nearest(w / scale) * scale).double().T - y).square().sum(0))
    best = start * parts[torch.stack(costs).argmin(0)]
    torch.testing.assert_close(found.tensor.params["scale"][:, 0], best, rtol=1e-6, atol=0)

    w_hat = (E2M1.nearest(w / best[:, None]) * best[:, None]).double()
    tried = torch.cat([parts, torch.arange(1.4, 2.01, 0.4)]) if shift else parts
    costs = [(x_hat(top * p) @ w_hat.T - y).square().sum() for p in tried]
    chosen = top * tried[int(torch.stack(costs).argmin())]
    torch.testing.assert_close(found.inputs.params["scale"].view(()), chosen, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "knobs_", [{}, {"preshift": False}, {"act_bits": None}, {"act_bits": 8}, {"search": "bias"}, {"shortlist": None}, {"act_formats": "e1m2"}],
    ids=str,
)
@pytest.mark.parametrize("blocks", [channel(), group(16), group(10)], ids=str)
def test_never_worse_than_its_start(knobs_: dict[str, Any], blocks: Any) -> None:
    part = {"grid": (0.1, 1.0, 19), **knobs_}
    for seed in range(2):
        x, w = problem(32, 40, 6, seed)
        scheme = float_format("e2m1") @ blocks
        errors = [error(x, w, searched(FormatSearch(**{**part, "rounds": r}), x, w, scheme=scheme)[0]) for r in range(4)]
        assert all(b <= a * (1 + 1e-5) for a, b in pairwise(errors))
        assert errors[3] < errors[0]


def test_the_report_says_the_error_of_what_is_stored() -> None:
    x, w = problem()
    found = searched(FormatSearch(), x, w)[0]
    assert found.facts["error"] == pytest.approx(error(x, w, found), rel=1e-4)
    start = searched(FormatSearch(rounds=0), x, w)[0]
    assert found.facts["start_error"] == pytest.approx(error(x, w, start), rel=1e-4) and start.facts["rounds"] == 0
    assert found.facts["weights"] == str(found.tensor.grid.format)


def test_a_shortlist_finds_nearly_what_all_candidates_find() -> None:
    ratios = []
    for seed in range(3):
        x, w = problem(200, 64, 32, seed)
        few, every = (error(x, w, searched(FormatSearch(shortlist=n), x, w)[0]) for n in (8, None))
        ratios.append(few / every)
    assert sum(ratios) / len(ratios) < 1.05


def test_equal_channels_need_no_shift() -> None:
    """beta = 0 everywhere: FPQ is its baseline, to the bit."""
    x, w = problem()
    x = x / x.abs().amax(0)
    a, b = (searched(FormatSearch(preshift=on), x, w)[0] for on in (True, False))
    assert a.inputs is not None and b.inputs is not None and a.inputs.params is not None and b.inputs.params is not None
    assert a.inputs.shift is not None and not bool(a.inputs.shift.any()) and b.inputs.shift is None
    assert torch.equal(a.inputs.params["scale"], b.inputs.params["scale"]) and a.inputs.scheme == b.inputs.scheme
    assert torch.equal(a.tensor.dequantize(), b.tensor.dequantize()) and torch.equal(rounded_inputs(a.inputs, x), rounded_inputs(b.inputs, x))


def test_the_shift_helps_where_channels_differ() -> None:
    ratios = []
    for seed in range(3):
        x, w = problem(128, 48, 24, seed)
        ratios.append(error(x, w, searched(FormatSearch(), x, w)[0]) / error(x, w, searched(FormatSearch(preshift=False), x, w)[0]))
    assert sum(ratios) / len(ratios) < 0.75


def test_eight_bits_survive_the_shift() -> None:
    """The two roundings of beta may clip a channel to half; the search of rho beyond the maximum takes that back."""
    x, w = problem(256, 48, 32)
    scheme = float_format("e4m3") @ channel()
    shifted, plain = (
        error(x, w, searched(FormatSearch(act_bits=8, preshift=on), x, w, scheme=scheme)[0]) for on in (True, False)
    )
    assert shifted < 1.1 * plain < 2e-3


def test_layers_that_read_one_tensor_share_its_rounding() -> None:
    x, w = problem(outputs=12)
    other = problem(outputs=30, seed=1)[1] * 40
    together = searched(FormatSearch(), x, w, other)
    assert together[0].inputs is not None and together[0].inputs == together[1].inputs
    scale = searched(FormatSearch(), x, w, other * 2.0**9)[0].inputs
    assert scale is not None and scale.params is not None and together[0].inputs.params is not None
    assert torch.equal(scale.params["scale"], together[0].inputs.params["scale"])  # each counts by its relative error
    alone = [searched(FormatSearch(), x, weight)[0] for weight in (w, other)]
    assert sum(error(x, weight, r) for weight, r in zip((w, other), alone, strict=True)) <= 1.0001 * sum(
        error(x, weight, r) for weight, r in zip((w, other), together, strict=True)
    )


def test_float_inputs_and_other_grids() -> None:
    x, w = problem()
    assert searched(FormatSearch(act_bits=None), x, w)[0].inputs is None
    integers = Int(4) @ group(8)
    found = searched(FormatSearch(), x, w, scheme=integers)[0]  # integers keep their grid; their input is searched
    assert torch.equal(found.tensor.dequantize(), integers.quantize(w)) and found.inputs is not None
    eight = searched(FormatSearch(), x, w, scheme=float_format("e4m3") @ channel())[0]
    assert eight.tensor.grid.format.bits == 8
    unseen = FormatSearch().round(w, E2M1 @ channel(), (E2M1 @ channel()).fit(w), None)
    assert unseen.inputs is None and unseen.fallback is not None and "no calibration tokens" in unseen.fallback


def test_columns_push_the_rest_of_the_error_around() -> None:
    ratios = []
    for seed in range(4):
        x, w = problem(400, 32, 24, seed)
        nearest, columns = (searched(FormatSearch(codes=codes, act_bits=None), x, w)[0] for codes in ("nearest", "columns"))
        assert torch.equal(nearest.tensor.params["scale"], columns.tensor.params["scale"])
        ratios.append(error(x, w, columns) / error(x, w, nearest))
    assert sum(ratios) / len(ratios) < 1


def test_dead_channels_and_dead_inputs() -> None:
    x, w = problem()
    x[:, 3], w[2] = 0, 0
    found = searched(FormatSearch(), x, w)[0]
    assert found.inputs is not None and found.inputs.shift is not None
    assert int(found.inputs.shift[3]) == 2 ** found.inputs.scheme.format.exponent - 1  # type: ignore[attr-defined]
    assert bool((found.tensor.dequantize()[2] == 0).all())
    nothing = searched(FormatSearch(), torch.zeros_like(x), w)[0]
    assert bool((rounded_inputs(nothing.inputs, torch.zeros_like(x)) == 0).all()) and bool(torch.isfinite(nothing.tensor.dequantize()).all())
    with pytest.raises(ValueError, match="NaN or inf"):
        seen(x.masked_fill(x > 1, float("nan")))


def test_the_bias_search_tries_the_papers_candidates_and_the_start() -> None:
    start = torch.tensor([0.02, 3.0])
    tried = FormatSearch(search="bias").candidates(E2M1, start).double()
    assert tried.shape == (101, 2) and torch.allclose(tried[100].float(), start)
    bias = bias_of(E2M1, start * 6)
    for i in (0, 40, 99):
        torch.testing.assert_close(tried[i], scale_of(E2M1, (0.01 + i * 1.19 / 100) * bias), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"search": "grid"}, "search must be"),
        ({"codes": "best"}, "codes must be"),
        ({"grid": (0.5, 0.1, 9)}, "grid must be"),
        ({"rounds": -1}, "rounds must be"),
        ({"shortlist": 0}, "shortlist"),
        ({"act_formats": "e4m3"}, "8 bits, not 4"),
        ({"act_bits": 9}, "2 to 8"),
    ],
    ids=str,
)
def test_wrong_knobs_are_named(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        FormatSearch(**wrong)


# -- the method -----------------------------------------------------------------------------------------------------------


def quantized(model: nn.Module, **options: Any) -> Any:
    return dither.quantize(model, LLMFP4(**{**QUICK, **options}), TOKENS, compute=torch.float32)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits  # type: ignore[no-any-return]


def test_the_method_as_its_knobs_say() -> None:
    assert LLMFP4().scheme() == Float(2, 1) @ channel() and LLMFP4(bits=8).scheme() == Float(4, 3, nan=False) @ channel()
    part = LLMFP4(formats="e1m2", preshift=False, rounds=0).stages()[0]
    assert isinstance(part, FormatSearch) and part.act_formats == "e1m2" and not part.formats
    assert LLMFP4(formats="e2m1", act_bits=8).stages()[0].act_formats == "start"  # type: ignore[attr-defined]
    embed = LLMFP4(embed=4).recipe().embeddings
    assert embed == (Float(2, 1) @ channel()).with_clip(Clip(p=2, grid=100, shrink=0.91)) and LLMFP4().recipe().embeddings is None
    assert {"sym", "format", "act_format", "act_group"}.isdisjoint(knobs("llm-fp4"))
    assert build("llm-fp4", {"bits": 4, "act_bits": 8}).recipe().needs_data
    for wrong in ({"formats": "e4m3"}, {"formats": "fp4"}, {"scale": "e4m3"}, {"sym": "full"}, {"act_group": 8}, {"rounds": -1}):
        with pytest.raises(UsageError):
            build("llm-fp4", wrong)


def test_a_static_int4_is_one_of_its_formats() -> None:
    """rounds=0, e1m2: MinMax symmetric INT4 of weights by channel and inputs by tensor, from the float model's maxima."""
    model, _ = tiny_models.build("llama")
    result = quantized(model, rounds=0, preshift=False, formats="e1m2", scale="float32")
    peak = []
    handle = model.model.layers[1].mlp.gate_proj.register_forward_pre_hook(lambda module, args: peak.append(args[0].abs().max()))
    logits(model)
    handle.remove()
    layer = result.model.model.layers[1].mlp.gate_proj
    assert isinstance(layer, QuantLinear) and layer.inputs is not None
    w = model.model.layers[1].mlp.gate_proj.weight.detach()
    torch.testing.assert_close(layer.weight, (Int(4, sym="restricted", scale="float32") @ channel()).quantize(w), rtol=1e-6, atol=0)
    x = torch.randn(5, 32) * 3
    step = peak[0] / 7
    torch.testing.assert_close(layer.inputs(x), (x / step).round().clamp(-7, 7) * step, rtol=1e-5, atol=1e-6)


def test_end_to_end_counts_every_byte(tmp_path: Path) -> None:
    tiny_folder.save(tmp_path / "model", "llama")
    out = tmp_path / "out"
    result = dither.quantize(tmp_path / "model", LLMFP4(**QUICK), TOKENS, out)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert {"shift", "params"} <= set(next(iter(config["layers"].values()))["inputs"])
    loaded, _ = load(out)
    memory = dither.quantize(tmp_path / "model", LLMFP4(**QUICK), TOKENS).model
    assert torch.equal(logits(loaded), logits(memory))
    layers = [m for m in loaded.modules() if isinstance(m, QuantLinear)]
    stored = sum(b.numel() * b.element_size() for m in layers for b in m.buffers())
    weights = sum(m.in_features * m.out_features for m in layers)
    assert result.bits_per_weight == pytest.approx(8 * stored / weights)
    assert all(m.inputs is not None and m.inputs.shift is not None for m in layers)
    attention, mlp = loaded.model.layers[0].self_attn, loaded.model.layers[0].mlp
    for shared in ((attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)):
        first = dict(shared[0].inputs.named_buffers())
        assert all(torch.equal(b, first[n]) for m in shared for n, b in m.inputs.named_buffers())
        assert len({str(m.inputs.scheme) for m in shared}) == 1


def test_a_stopped_run_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    tiny_folder.save(tmp_path / "model", "llama")

    class Stop(Exception):
        pass

    def stop(event: Any) -> None:
        if event.done == 1:
            raise Stop

    whole = dither.quantize(tmp_path / "model", LLMFP4(**QUICK), TOKENS, tmp_path / "whole").out
    with pytest.raises(Stop):
        dither.quantize(tmp_path / "model", LLMFP4(**QUICK), TOKENS, tmp_path / "stopped", progress=stop)
    again = dither.quantize(tmp_path / "model", LLMFP4(**QUICK), TOKENS, tmp_path / "stopped")
    assert again.report.resumed_blocks > 0
    assert (again.out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_inputs_are_the_float_models_unless_asked_otherwise() -> None:
    """``between`` tells of the inputs alone: in the float model it cannot depend on how coarsely earlier layers were rounded."""
    model, _ = tiny_models.build("llama")
    spreads = {
        (bits, sequential): [row.facts["between"] for row in quantized(model, bits=bits, sequential=sequential).report.layers]
        for bits in (3, 8)
        for sequential in (False, True)
    }
    assert spreads[3, False] == spreads[8, False]
    assert spreads[3, True] != spreads[8, True] and spreads[3, True][0] == spreads[3, False][0]


def test_more_bits_lose_less() -> None:
    model, _ = tiny_models.build("llama")
    truth = logits(model)
    errors = [float((logits(quantized(model, **bits).model) - truth).square().mean()) for bits in ({}, {"act_bits": 8}, {"bits": 8, "act_bits": 8})]
    assert errors[0] > errors[1] > 5 * errors[2]


def test_embeddings_at_four_bits() -> None:
    model, _ = tiny_models.build("llama-tied")
    result = quantized(model, embed=4)
    table, head = model.get_input_embeddings().weight.detach(), result.model.lm_head
    scheme = (Float(2, 1) @ channel()).with_clip(Clip(p=2, grid=100, shrink=0.91))
    assert torch.equal(result.model.get_input_embeddings().weight, scheme.quantize(table))
    assert torch.equal(head.weight, scheme.quantize(table))
    assert isinstance(quantized(model, embed=4, skip=("*embed*",)).model.get_input_embeddings(), nn.Embedding)


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "whisper"])
def test_other_models(name: str) -> None:
    model, sample = tiny_models.build(name)
    result = dither.quantize(model, LLMFP4(**QUICK), [sample] if isinstance(sample, dict) else [{"input_ids": sample}])
    assert len(result.report.layers) > 0
    for row in result.report.layers:
        assert row.inputs is not None or "input left float" in (row.fallback or "")
    with torch.no_grad():
        assert bool(torch.isfinite(result.model(**(sample if isinstance(sample, dict) else {"input_ids": sample}))[0]).all())


def test_compositions() -> None:
    model, _ = tiny_models.build("llama")
    fp4 = Float(2, 1) @ channel()
    chain = Chain(AWQ(weights=fp4, clip=False, round=False), LLMFP4(**QUICK))
    result = dither.quantize(model, chain, TOKENS)
    assert all(row.inputs is not None for row in result.report.layers)
    with pytest.raises(UsageError, match="OutputClip chooses would be lost"):
        Chain(AWQ(weights=fp4, round=False), LLMFP4()).recipe()
    with pytest.raises(UsageError, match="one rounding"):
        Chain(LLMFP4(), GPTQ(weights=fp4)).recipe()
    with pytest.raises(UsageError, match="one output channel"):
        LLMFP4(weights=Float(2, 1) @ dither.formats.tensor()).recipe()
    columns = quantized(model, codes="columns", group=16)
    assert all("group(16)" in row.scheme for row in columns.report.layers)
