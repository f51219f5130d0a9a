"""Rotations and scalings of whole models: they keep the float function, in float64, and what is stored is what was folded."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dither
import tiny_models
from dither.errors import SiteError, UsageError
from dither.formats import Int
from dither.graph.exact import relative_difference
from dither.quant.recipes import OSTQuant, QuaRot, build
from dither.quant.transforms.rotate import Plan, Rotate, random_stream, turn_order
from dither.special import hadamard
from rewriting import TOKENS, output, random_turnings, view_of

ROTATING = ["llama", "llama-tied", "qwen2", "qwen3", "gpt2", "phi3", "mixtral", "qwen3-moe", "granite", "vit"]


@pytest.mark.parametrize("name", ROTATING)
def test_rotating_keeps_the_float_function(name: str) -> None:
    view = view_of(name)
    before, weights = output(view), copy.deepcopy(view.model.state_dict())
    Rotate().apply(view)
    assert relative_difference(output(view), before) < 1e-9
    moved = [n for n, p in view.model.state_dict().items() if n in weights and p.dim() > 1 and not torch.equal(p, weights[n])]
    assert len(moved) >= 8


@pytest.mark.parametrize("name", ["llama-tied", "qwen2", "gpt2", "phi3", "mixtral"])
def test_all_rotations_and_scalings_together_keep_the_float_function(name: str) -> None:
    view = view_of(name)
    plan, before = Plan.of(view, online=True, head_groups=True), output(view)
    turnings = random_turnings(plan)
    assert turnings.heads and turnings.scales and (name != "llama-tied" or {s.rotated for s in plan.scales.values()} == {True, False})
    plan.fold(view, turnings)
    assert relative_difference(output(view), before) < 1e-9


def test_tied_heads_are_separated_and_norms_are_plain() -> None:
    view = view_of("llama-tied")
    Rotate().apply(view)
    model: Any = view.model
    assert model.lm_head.weight is not model.model.embed_tokens.weight and not model.config.tie_word_embeddings
    assert all(torch.equal(p, torch.ones_like(p)) for n, p in model.named_parameters() if "norm" in n)


def test_only_what_no_fold_rotates_is_turned() -> None:
    view = view_of("llama")
    Rotate().apply(view)
    assert view.turns == {f"model.layers.{i}.mlp.down_proj": 48 for i in range(2)}
    quiet = view_of("llama")
    Rotate(online=False).apply(quiet)
    assert quiet.turns == {} and not any(type(m).__name__ == "Turned" for m in quiet.model.modules())


def test_scalings_come_before_the_turn_of_the_down_projection() -> None:
    """W_d <- (W_d diag(S)) H, and its rows turn with the stream; diag(S) and H do not commute."""
    view = view_of("llama")
    plan = Plan.of(view, online=True, head_groups=True)
    w = view.model.get_parameter("model.layers.1.mlp.down_proj.weight").clone()
    turnings = random_turnings(plan)
    key = next(k for k, s in plan.scales.items() if k.startswith("model.layers.1:") and s.site.producer.name == "mlp.up_proj")
    plan.fold(view, turnings)
    folded = view.model.get_parameter("model.layers.1.mlp.down_proj.layer.weight")
    s, h, r = torch.diag(turnings.scales[key]), hadamard(48), turnings.streams[0]
    torch.testing.assert_close(folded, r.T @ (w @ s) @ h, rtol=1e-12, atol=1e-12)
    assert float((folded - r.T @ (w @ h) @ s).abs().max()) > 0.1


def test_norms_commute_with_rotations() -> None:
    """RMSNorm(x R) = RMSNorm(x) R; LayerNorm(x R) = LayerNorm(x) R where R fixes the vector of ones."""
    x = torch.randn(5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rms, layer = nn.RMSNorm(32, eps=1e-6, dtype=torch.float64), nn.LayerNorm(32, dtype=torch.float64)
    plan = [Plan.of(view_of(name), online=True, head_groups=True).whole.residuals[0] for name in ("llama", "gpt2")]
    for norm, stream in zip((rms, layer), plan, strict=True):
        r = random_stream(stream, 3)
        torch.testing.assert_close(norm(x @ r), norm(x) @ r, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("inputs", [12, 48, 1536, 576, 11008, 37, 2])
def test_turn_orders_divide(inputs: int) -> None:
    order = turn_order(inputs)
    assert inputs % order == 0 and (order == 1 or hadamard(order).shape == (order, order))
    assert order == {12: 12, 48: 48, 1536: 1536, 576: 576, 37: 1, 2: 2}.get(inputs, order) and (inputs != 11008 or order >= 256)


def test_models_without_a_stream_that_rotates_are_refused() -> None:
    model, _ = tiny_models.build("bert")
    with pytest.raises(SiteError, match="no residual stream provably rotates"):
        dither.quantize(model, QuaRot(kv_bits=None), TOKENS)
    with pytest.raises(SiteError, match="no chain of blocks"):
        dither.quantize(nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16)), QuaRot(kv_bits=None), [{"input": torch.randn(64, 16)}])
    vit, _ = tiny_models.build("vit")
    with pytest.raises(UsageError, match="calibration"):
        dither.quantize(vit, QuaRot(kv_bits=None, rounding="rtn"))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(TOKENS).logits
    return found


def test_eight_bits_are_nearly_the_float_model() -> None:
    model, _ = tiny_models.build("llama-tied")
    found = dither.quantize(model, QuaRot(bits=8, act_bits=8, kv_bits=8), TOKENS, compute=torch.float32).model
    assert float((logits(found) - logits(model)).norm() / logits(model).norm()) < 0.03


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_checkpoints_with_turns_load_through_transformers(name: str, tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM

    model, _ = tiny_models.build(name)
    recipe = QuaRot(rounding="rtn")
    memory = dither.quantize(model, recipe, TOKENS)
    dither.quantize(model, recipe, TOKENS, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(memory.model))
    assert any(type(m).__name__ == "Turned" for m in loaded.modules())


def test_skipped_and_overridden_layers_are_known_by_their_own_names() -> None:
    model, _ = tiny_models.build("llama")
    recipe = QuaRot(rounding="rtn", skip=("*.0.mlp.down_proj",), overrides={"*.1.mlp.down_proj": Int(8, sym=True) @ dither.formats.channel()})
    found = dither.quantize(model, recipe, TOKENS)
    rows = {row.name: row for row in found.report.layers}
    assert "model.layers.0.mlp.down_proj" in dict(found.model.named_modules()) and not any("0.mlp.down_proj" in n for n in rows)
    assert "int8" in rows["model.layers.1.mlp.down_proj.layer"].scheme


def test_inputs_behind_heads_have_one_scale_a_head() -> None:
    model, _ = tiny_models.build("llama")
    found = dither.quantize(model, QuaRot(rounding="rtn"), TOKENS)
    rows = {row.name: row.inputs for row in found.report.layers}
    assert "group(8)" in str(rows["model.layers.0.self_attn.o_proj"]) and "token" in str(rows["model.layers.0.self_attn.q_proj"])
    plain = dither.quantize(model, QuaRot(rounding="rtn", head_groups=False), TOKENS)
    assert {row.inputs for row in plain.report.layers} == {rows["model.layers.0.self_attn.q_proj"]}


@pytest.mark.parametrize("chain", ["quarot+gptq", "quarot+rtn", "quarot+awq", "quarot+vptq", "quarot+flexround", "ostquant+gptq"])
def test_rotations_compose_with_what_rounds(chain: str) -> None:
    model, _ = tiny_models.build("llama")
    options: dict[str, Any] = {"bits": 3, "steps": 2} if "flexround" in chain or "ostquant" in chain else {"bits": 3}
    if chain == "ostquant+gptq":
        options["k_top"] = 50
    try:
        method = build(chain, options)
    except UsageError as error:
        if "is unknown" in str(error):
            pytest.skip(str(error))
        raise
    found = dither.quantize(model, method, TOKENS)
    assert torch.isfinite(logits(found.model)).all()
    assert any(type(m).__name__ == "Turned" for m in found.model.modules())


def test_method_knobs_are_checked() -> None:
    with pytest.raises(ValueError, match="rounding must be"):
        QuaRot(rounding="up").stages()
    for bad in ({"budget": "slow"}, {"loss": "mse"}, {"learn": ("R",)}, {"init": "none"}, {"steps": 0}, {"lr_scale": 0.0}, {"optimizer": "sgd"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            OSTQuant(**bad).stages()
