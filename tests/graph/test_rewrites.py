"""The rewrites themselves: what they refuse, which types they keep, and what a rotation has to satisfy."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from dither.graph import apply_scale, apply_shift, discover, fix_ones, random_rotation, rotate_residual
from tiny_models import build


@pytest.fixture(scope="module")
def opt() -> tuple[nn.Module, object]:
    model, sample = build("opt")
    return model, discover(model, sample)


def test_wrong_values_are_refused(opt) -> None:
    model, structure = opt
    before = {n: p.clone() for n, p in model.named_parameters()}
    scale = next(s for s in structure.sites if s.kind == "scale")
    shift = next(s for s in structure.sites if s.kind == "shift")
    ones = torch.ones(scale.channels)
    for bad in (ones * 0, -ones, ones * float("nan"), ones * float("inf")):
        with pytest.raises(ValueError, match="finite and positive"):
            apply_scale(model, scale, bad)
    with pytest.raises(ValueError, match="needs 32 values"):
        apply_scale(model, scale, torch.ones(3))
    with pytest.raises(ValueError, match="must be a scale site"):
        apply_scale(model, shift, ones)
    with pytest.raises(ValueError, match="must be a shift site"):
        apply_shift(model, scale, ones)
    with pytest.raises(ValueError, match="finite"):
        apply_shift(model, shift, torch.full((shift.channels,), float("nan")))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_rotations_are_checked(opt) -> None:
    model, structure = opt
    stream = structure.residual
    with pytest.raises(ValueError, match=r"must be \[32, 32\]"):
        rotate_residual(model, stream, torch.eye(31))
    with pytest.raises(ValueError, match="orthogonal"):
        rotate_residual(model, stream, 2 * torch.eye(32))
    with pytest.raises(ValueError, match="vector of ones"):
        rotate_residual(model, stream, torch.eye(32).roll(1, 0) * torch.tensor([-1.0] + [1.0] * 31))


@pytest.mark.parametrize("width", [2, 3, 8, 33])
def test_fix_ones(width: int) -> None:
    draw = torch.randn(width - 1, width - 1, generator=torch.Generator().manual_seed(width), dtype=torch.float64)
    q = fix_ones(torch.linalg.qr(draw).Q)
    ones = torch.ones(width, dtype=torch.float64)
    assert torch.allclose(q @ q.mT, torch.eye(width, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(q @ ones, ones, atol=1e-12) and torch.allclose(ones @ q, ones, atol=1e-12)
    with pytest.raises(ValueError, match="square"):
        fix_ones(torch.ones(2, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_parameters_keep_their_type_and_training_state(dtype: torch.dtype, opt) -> None:
    model, structure = copy.deepcopy(opt[0]).to(dtype), opt[1]
    identity = {n: id(p) for n, p in model.named_parameters()}
    for site in structure.sites:
        fold = apply_scale if site.kind == "scale" else apply_shift
        fold(model, site, torch.full((site.channels,), 1.25))
    assert all(p.dtype == dtype and p.requires_grad and id(p) == identity[n] for n, p in model.named_parameters())


def test_shift_creates_the_biases_it_needs_and_later_rewrites_respect_them() -> None:
    model, sample = build("llama")
    structure = discover(model, sample)
    model = model.double()
    with torch.no_grad():
        before = model(**sample).logits
    shifts = [s for s in structure.sites if s.kind == "shift"]
    for site in shifts:
        apply_shift(model, site, torch.linspace(-2, 2, site.channels))
    attention = model.model.layers[0].self_attn
    assert attention.v_proj.bias is not None and attention.o_proj.bias is not None
    for site in structure.sites:
        if site.kind == "scale":
            apply_scale(model, site, torch.linspace(0.5, 2, site.channels))
    rotate_residual(model, structure.residual, random_rotation(structure.residual))
    with torch.no_grad():
        after = model(**sample).logits
    assert torch.allclose(after, before, rtol=1e-5, atol=1e-6)  # the model itself computes its norms in float32


def test_rotation_separates_a_tied_head() -> None:
    model, sample = build("llama-tied")
    structure = discover(model, sample)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    rotate_residual(model, structure.residual, random_rotation(structure.residual))
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is False


def test_factor_of_zero_next_to_a_bias_is_refused(opt) -> None:
    model, structure = copy.deepcopy(opt[0]), opt[1]
    norm = structure.residual.norms[0].producer
    with torch.no_grad():
        model.get_parameter(norm.parameter)[3] = 0
    with pytest.raises(ValueError, match="factor is 0"):
        rotate_residual(model, structure.residual, random_rotation(structure.residual))


def test_layer_matrix_is_a_view_in_output_by_input_order() -> None:
    for name in ("gpt2", "mixtral", "conv", "llama"):
        model, sample = build(name)
        for layer in discover(model, sample).layers:
            matrix = layer.matrix(model)
            parameter = model.get_parameter(layer.parameter)
            assert matrix.shape[-2] == layer.out_features and matrix.data_ptr() == parameter.data_ptr()
            assert layer.shape == tuple(parameter.shape)
            if layer.kind != "conv":
                assert matrix.shape[-1] == layer.in_features
            new = torch.randn_like(matrix)
            layer.write(model, new)
            assert torch.equal(layer.matrix(model), new)
            with pytest.raises(ValueError, match="must be"):
                layer.write(model, new[..., :-1])


def test_groups_follow_the_calls() -> None:
    model, sample = build("llama")
    structure = discover(model, sample)
    at = "model.layers.0"
    first = structure.groups()[:4]
    assert first == [
        [f"{at}.self_attn.{p}_proj" for p in "qkv"], [f"{at}.self_attn.o_proj"], [f"{at}.mlp.gate_proj", f"{at}.mlp.up_proj"],
        [f"{at}.mlp.down_proj"],
    ]  # fmt: skip
    assert structure.groups([f"{at}.self_attn.k_proj", "lm_head"]) == [[f"{at}.self_attn.k_proj"], ["lm_head"]]
    logits = {f"model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qk"}
    assert structure.attention_logit_layers == logits
    assert [layer.block for layer in structure.layers] == [0] * 7 + [1] * 7 + [None]
    assert structure.layer("lm_head").is_head
    with pytest.raises(KeyError, match="no layer"):
        structure.layer("nothing")
    assert replace(structure.layers[0], block=None).within(at).parameter == "self_attn.q_proj.weight"
    with pytest.raises(ValueError, match="inside"):
        structure.layers[0].within("model.layers.1")
