"""The sites that are known to exist are found, with their channel maps, and those that would be wrong are not reported."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from dither.graph import Site, Structure, discover
from tiny_models import build


@cache
def known(name: str) -> Structure:
    return discover(*build(name))


def site(structure: Structure, producer: str, *consumers: str, kind: str = "scale") -> Site:
    found = [s for s in structure.sites if s.kind == kind and s.producer.name == producer]
    found = [s for s in found if {c.name for c in s.consumers} == set(consumers)]
    assert len(found) == 1, f"{producer} -> {consumers} not in\n{structure.summary()}"
    return found[0]


def none_feeds(structure: Structure, layer: str) -> None:
    assert not structure.sites_of(layer)
    assert any(name == layer and why for name, why in structure.unproved)


def straight(s: Site) -> bool:
    return all(torch.equal(c.channel_map, torch.arange(s.channels)) for c in s.consumers)


GQA = torch.cat(
    [torch.arange(8), torch.arange(8), torch.arange(8, 16), torch.arange(8, 16)]
)  # 4 query heads, 2 value heads, 8 wide


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "granite", "stablelm"])
def test_gated_decoders(name: str) -> None:
    structure = known(name)
    for i in range(2):
        at = f"model.layers.{i}"
        norm = site(structure, f"{at}.input_layernorm", *(f"{at}.self_attn.{p}_proj" for p in "qkv"))
        assert straight(norm) and norm.channels == 32 and norm.scope == f"{at}.self_attn"
        values = site(structure, f"{at}.self_attn.v_proj", f"{at}.self_attn.o_proj")
        assert torch.equal(values.channel_map, GQA) and values.expands and values.channels == 16
        assert straight(site(structure, f"{at}.post_attention_layernorm", f"{at}.mlp.gate_proj", f"{at}.mlp.up_proj"))
        up = site(structure, f"{at}.mlp.up_proj", f"{at}.mlp.down_proj")
        assert straight(up) and up.channels == 48 and not up.expands
    assert straight(site(structure, "model.norm", "lm_head"))


def test_shift_through_attention_and_none_through_a_gate() -> None:
    structure = known("llama")
    site(structure, "model.layers.0.self_attn.v_proj", "model.layers.0.self_attn.o_proj", kind="shift")
    assert not structure.sites_of("model.layers.0.mlp.down_proj", "shift")


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_norms_that_store_the_factor_less_one(name: str) -> None:
    structure = known(name)
    norm = site(structure, "model.layers.0.input_layernorm", *(f"model.layers.0.self_attn.{p}_proj" for p in "qkv"))
    assert norm.producer.offset == 1.0 and straight(norm)
    assert all(s.producer.offset == 0.0 for s in known("llama").sites)
    produced = {s.producer.name for s in structure.sites}
    assert not any("post_attention_layernorm" in p or "post_feedforward" in p or "q_norm" in p for p in produced)
    assert not structure.residuals


def test_tied_head_is_left_alone() -> None:
    structure = known("llama-tied")
    none_feeds(structure, "lm_head")
    assert structure.layer("lm_head").is_head
    assert ("lm_head.weight", "model.embed_tokens.weight") in structure.residual.ties


def test_phi3_fused_weights() -> None:
    structure = known("phi3")
    at = "model.layers.0"
    values = site(structure, f"{at}.self_attn.qkv_proj", f"{at}.self_attn.o_proj")
    assert torch.equal(values.producer.rows, torch.arange(48, 64)) and torch.equal(values.channel_map, GQA)
    up = site(structure, f"{at}.mlp.gate_up_proj", f"{at}.mlp.down_proj")
    assert torch.equal(up.producer.rows, torch.arange(48, 96)) and straight(up)


def test_gpt2_transposed_storage_and_gelu() -> None:
    structure = known("gpt2")
    at = "transformer.h.1"
    layer = structure.layer(f"{at}.attn.c_attn")
    assert layer.swapped and (layer.out_features, layer.in_features) == (96, 32)
    norm = site(structure, f"{at}.ln_1", f"{at}.attn.c_attn")
    assert norm.producer.bias == f"{at}.ln_1.bias"
    values = site(structure, f"{at}.attn.c_attn", f"{at}.attn.c_proj")
    assert torch.equal(values.producer.rows, torch.arange(64, 96)) and straight(values)
    none_feeds(structure, f"{at}.mlp.c_proj")


@pytest.mark.parametrize(
    ("name", "fused", "out"),
    [
        ("gpt-neox", "gpt_neox.layers.0.attention.query_key_value", "gpt_neox.layers.0.attention.dense"),
        ("bloom", "transformer.h.0.self_attention.query_key_value", "transformer.h.0.self_attention.dense"),
    ],
)
def test_interleaved_fused_values(name: str, fused: str, out: str) -> None:
    values = site(known(name), fused, out)
    expected = torch.arange(96).view(4, 3, 8)[:, 2].flatten()  # per head: q, k, v
    assert torch.equal(values.producer.rows, expected) and straight(values)
    none_feeds(known(name), out.rpartition(".")[0].rpartition(".")[0] + ".mlp.dense_4h_to_h")


def test_falcon_parallel_blocks() -> None:
    at = "transformer.h.0"
    old, new = known("falcon"), known("falcon-new")
    site(old, f"{at}.input_layernorm", f"{at}.self_attention.query_key_value", f"{at}.mlp.dense_h_to_4h")
    multi_query = site(old, f"{at}.self_attention.query_key_value", f"{at}.self_attention.dense")
    assert torch.equal(multi_query.channel_map, torch.arange(8).repeat(4))  # one value head for all query heads
    site(new, f"{at}.ln_attn", f"{at}.self_attention.query_key_value")
    site(new, f"{at}.ln_mlp", f"{at}.mlp.dense_h_to_4h")


def test_opt_relu_lets_scales_through_but_not_shifts() -> None:
    structure = known("opt")
    at = "model.decoder.layers.0"
    site(structure, f"{at}.self_attn_layer_norm", *(f"{at}.self_attn.{p}_proj" for p in "qkv"))
    site(structure, f"{at}.self_attn.v_proj", f"{at}.self_attn.out_proj")
    site(structure, f"{at}.final_layer_norm", f"{at}.fc1")
    hidden = site(structure, f"{at}.fc1", f"{at}.fc2")
    assert straight(hidden) and hidden.channels == 64 and hidden.producer.bias == f"{at}.fc1.bias"
    assert not structure.sites_of(f"{at}.fc2", "shift")
    site(structure, f"{at}.final_layer_norm", f"{at}.fc1", kind="shift")


@pytest.mark.parametrize(("name", "width"), [("mixtral", 48), ("qwen3-moe", 24), ("qwen2-moe", 24)])
def test_routers_read_with_the_experts(name: str, width: int) -> None:
    structure = known(name)
    mlp = "model.layers.0.mlp"
    readers = [f"{mlp}.gate", f"{mlp}.experts.gate_up_proj"]
    if name == "qwen2-moe":
        readers += [f"{mlp}.shared_expert.gate_proj", f"{mlp}.shared_expert.up_proj", f"{mlp}.shared_expert_gate"]
        site(structure, f"{mlp}.shared_expert.up_proj", f"{mlp}.shared_expert.down_proj")
    norm = site(structure, "model.layers.0.post_attention_layernorm", *readers)
    router = next(c for c in norm.consumers if c.name == f"{mlp}.gate")
    assert router.layer is None and torch.equal(router.channel_map, torch.arange(32))
    stack = next(c for c in norm.consumers if c.kind == "experts")
    assert torch.equal(stack.channel_map, torch.arange(32).repeat(4))
    inner = site(structure, f"{mlp}.experts.gate_up_proj", f"{mlp}.experts.down_proj")
    expected = torch.arange(4 * 2 * width).view(4, 2, width)[:, 1].flatten()  # the up half of each expert
    assert torch.equal(inner.producer.rows, expected) and straight(inner)
    assert structure.layer(f"{mlp}.experts.down_proj").kind == "experts"
    assert f"{mlp}.gate" not in {layer.name for layer in structure.layers}


def test_mamba() -> None:
    structure = known("mamba")
    mixer = "backbone.layers.0.mixer"
    site(structure, "backbone.layers.0.norm", f"{mixer}.in_proj")
    conv = site(structure, f"{mixer}.in_proj", f"{mixer}.conv1d")
    assert torch.equal(conv.producer.rows, torch.arange(64)) and conv.consumers[0].groups == 64
    steps = site(structure, f"{mixer}.x_proj", f"{mixer}.dt_proj")
    assert torch.equal(steps.producer.rows, torch.arange(4))
    none_feeds(structure, f"{mixer}.out_proj")
    assert not any(
        s.kind == "shift" and s.consumers[0].kind == "conv" for s in structure.sites
    )  # zero padding sees no shift


def test_mamba2_gated_norm() -> None:
    structure = known("mamba2")
    site(structure, "backbone.layers.0.norm", "backbone.layers.0.mixer.in_proj")
    site(structure, "backbone.layers.0.mixer.norm", "backbone.layers.0.mixer.out_proj")


def test_bert_normalises_after_adding() -> None:
    structure = known("bert")
    at = "bert.encoder.layer.0"
    site(structure, f"{at}.attention.self.value", f"{at}.attention.output.dense")
    for layer in (f"{at}.intermediate.dense", f"{at}.output.dense", "bert.encoder.layer.1.attention.self.query"):
        none_feeds(structure, layer)
    assert not structure.residuals


def test_olmo2_has_no_norm_before_its_weights() -> None:
    structure = known("olmo2")
    none_feeds(structure, "model.layers.0.self_attn.q_proj")
    none_feeds(structure, "model.layers.0.mlp.gate_proj")
    site(structure, "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj")


def test_vision() -> None:
    vit, swin = known("vit"), known("swin")
    site(vit, "vit.layers.0.layernorm_after", "vit.layers.0.mlp.fc1")
    none_feeds(vit, "vit.layers.0.mlp.fc2")
    site(vit, "vit.layernorm", "classifier")
    merge = site(swin, "swin.encoder.layers.0.downsample.norm", "swin.encoder.layers.0.downsample.reduction")
    assert merge.channels == 64
    assert [(b.chain, b.index) for b in swin.blocks] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_encoder_decoder() -> None:
    t5, whisper = known("t5"), known("whisper")
    cross = "decoder.block.0.layer.1"
    site(t5, f"{cross}.layer_norm", f"{cross}.EncDecAttention.q")
    site(t5, f"{cross}.EncDecAttention.v", f"{cross}.EncDecAttention.o")
    site(t5, "encoder.block.0.layer.1.DenseReluDense.wi", "encoder.block.0.layer.1.DenseReluDense.wo")
    none_feeds(t5, f"{cross}.EncDecAttention.k")  # the encoder's last norm is also returned by the model
    for structure in (t5, whisper):
        assert sorted({b.chain for b in structure.blocks}) == [0, 1] and len(structure.blocks) == 4
    assert [r.chain for r in t5.residuals] == [1] and [r.chain for r in whisper.residuals] == [1]
    none_feeds(whisper, "model.encoder.layers.0.fc2")


def test_plain_networks() -> None:
    mlp, conv = known("mlp"), known("conv")
    site(mlp, "0", "2")
    site(mlp, "2", "4")
    none_feeds(mlp, "6")
    assert not mlp.blocks and mlp.layer("6").is_head and not mlp.layer("0").is_head
    site(conv, "1", "3")  # a batch norm, through ReLU, into a depthwise convolution
    site(conv, "3", "4")
    site(conv, "5", "8")
    site(conv, "8", "11")
    site(conv, "8", "11", kind="shift")
    assert not conv.sites_of("3", "shift")
