"""Rotating heads: found where attention stands between two weights and nowhere else, and exact with random rotations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dither.graph import HeadRotation, Structure, discover_block, find_head_rotations, rotate_heads
from dither.graph.exact import bench_copy, exact_calls, relative_difference, run_exactly
from tiny_models import build

# model -> block, (producer, reader, heads, size). Llama-like: 4 query heads of 8 on 2 key and value heads
FOUND: dict[str, tuple[str, list[tuple[str, str, int, int]]]] = {
    "llama": ("model.layers.1", [("self_attn.v_proj", "self_attn.o_proj", 2, 8)]),
    "qwen2": ("model.layers.1", [("self_attn.v_proj", "self_attn.o_proj", 2, 8)]),
    "qwen3": ("model.layers.0", [("self_attn.v_proj", "self_attn.o_proj", 2, 8)]),
    "phi3": ("model.layers.1", [("self_attn.qkv_proj", "self_attn.o_proj", 2, 8)]),
    "gpt2": ("transformer.h.1", [("attn.c_attn", "attn.c_proj", 4, 8)]),
    "gpt-neox": ("gpt_neox.layers.0", [("attention.query_key_value", "attention.dense", 4, 8)]),
    "falcon": ("transformer.h.0", [("self_attention.query_key_value", "self_attention.dense", 1, 8)]),
    "opt": ("model.decoder.layers.0", [("self_attn.v_proj", "self_attn.out_proj", 4, 8)]),  # a ReLU in the feed-forward
    "bert": ("bert.encoder.layer.1", [("attention.self.value", "attention.output.dense", 4, 8)]),
    "vit": ("vit.layers.1", [("attention.v_proj", "attention.o_proj", 4, 8)]),
    "mixtral": ("model.layers.0", [("self_attn.v_proj", "self_attn.o_proj", 2, 8)]),
    "mlp": ("", []),
}


def block_calls(
    model: nn.Module, sample: Any, name: str
) -> tuple[nn.Module, list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """The block and the arguments that it gets, without the cache that would grow from run to run."""
    if hasattr(model, "config"):
        model.config.use_cache = False
    block = model.get_submodule(name)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    handle = block.register_forward_pre_hook(lambda _m, a, k: calls.append((a, k)), with_kwargs=True)
    with torch.no_grad():
        model(**sample) if isinstance(sample, dict) else model(sample)
    handle.remove()
    return block, calls


def orthogonal(*shape: int, seed: int = 0) -> torch.Tensor:
    draw = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(draw).Q


def examined(name: str) -> tuple[nn.Module, Any, Structure, list[HeadRotation]]:
    model, sample = build(name)
    block, calls = block_calls(model, sample, FOUND[name][0])
    structure = discover_block(block, calls)
    return block, calls, structure, find_head_rotations(block, calls, structure)


@pytest.mark.parametrize("name", FOUND)
def test_found_where_true_and_exact(name: str) -> None:
    block, calls, structure, found = examined(name)
    seen = [(r.site.producer.name, c.name, r.heads, r.size) for r in found for c in r.site.consumers]
    assert seen == FOUND[name][1], structure.summary()
    exact = bench_copy(block)
    calls = exact_calls(calls)
    before = run_exactly(exact, calls)
    for i, rotation in enumerate(found):
        weights = {n: p.clone() for n, p in exact.named_parameters()}
        rotate_heads(exact, rotation, orthogonal(rotation.heads, rotation.size, rotation.size, seed=i))
        changed = {n for n, p in exact.named_parameters() if not torch.equal(p, weights[n])}
        producer = rotation.site.producer
        touched = {producer.parameter, *(c.parameter for c in rotation.site.consumers)}
        if producer.bias is not None and bool(weights[producer.bias].any()):  # fresh biases are 0
            touched.add(producer.bias)
        assert changed == touched
    assert relative_difference(run_exactly(exact, calls), before) < 1e-9


def test_biases_turn_with_their_rows() -> None:
    """Qwen2's value bias is zero when fresh: with a random one the function stays the same only if it turns too."""
    model, sample = build("qwen2")
    block, calls = block_calls(model, sample, "model.layers.1")
    nn.init.normal_(block.self_attn.v_proj.bias)
    block = block.double()
    calls = exact_calls(calls)
    (rotation,) = find_head_rotations(block, calls, discover_block(block, calls))
    before, bias = run_exactly(block, calls), block.self_attn.v_proj.bias.clone()
    rotate_heads(block, rotation, orthogonal(2, 8, 8))
    assert relative_difference(run_exactly(block, calls), before) < 1e-9
    assert not torch.equal(block.self_attn.v_proj.bias, bias)


def test_the_map_of_grouped_queries() -> None:
    block, _, _, (rotation,) = examined("llama")
    assert rotation.heads_of(rotation.site.consumers[0]).tolist() == [0, 0, 1, 1]
    assert str(rotation) == "rotation: self_attn.v_proj -> self_attn.o_proj (2 heads of 8)"
    assert block.self_attn.v_proj.weight.dtype == torch.float32
    r = orthogonal(2, 8, 8)
    value, out = block.self_attn.v_proj.weight.double(), block.self_attn.o_proj.weight.double()
    rotate_heads(block, rotation, r)
    expected = torch.cat([r[0].T @ value[:8], r[1].T @ value[8:]])  # the spec: rows of head g <- R_g^T W_v[g]
    torch.testing.assert_close(block.self_attn.v_proj.weight.double(), expected, rtol=0, atol=1e-6)
    expected = torch.cat([out[:, 8 * h : 8 * h + 8] @ r[h // 2] for h in range(4)], 1)  # W_o[:, h] R_g(h)
    torch.testing.assert_close(block.self_attn.o_proj.weight.double(), expected, rtol=0, atol=1e-6)


def test_two_weights_in_a_row_rotate_as_one_head() -> None:
    """With nothing in between, all 12 channels are one head; a gate of one factor for each run of 3 leaves heads of 3."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.gate = nn.Linear(5, 12), nn.Linear(12, 7), nn.Linear(5, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second((self.first(x).unflatten(-1, (4, 3)) * self.gate(x).tanh()[..., None]).flatten(-2))

    for module, heads, size in ((nn.Sequential(nn.Linear(5, 12), nn.Linear(12, 7)), 1, 12), (Gated(), 4, 3)):
        calls = [((torch.randn(9, 5),), {})]
        structure = discover_block(module, calls)
        before = {n: p.clone() for n, p in module.named_parameters()}
        found = find_head_rotations(module, calls, structure)
        assert [(r.heads, r.size) for r in found if r.site.producer.name in ("0", "first")] == [(heads, size)]
        assert all(torch.equal(p, before[n]) for n, p in module.named_parameters())


def test_wrong_rotations_are_refused() -> None:
    block, _, structure, (rotation,) = examined("llama")
    before = {n: p.clone() for n, p in block.named_parameters()}
    for bad, message in (
        (torch.eye(8), r"must be \[2, 8, 8\]"),
        (2 * torch.eye(8).expand(2, 8, 8), "orthogonal"),
        (torch.full((2, 8, 8), float("nan")), "orthogonal"),
    ):
        with pytest.raises(ValueError, match=message):
            rotate_heads(block, rotation, bad)
    with pytest.raises(ValueError, match="at least one call"):
        find_head_rotations(block, [], structure)
    assert all(torch.equal(p, before[n]) for n, p in block.named_parameters())
