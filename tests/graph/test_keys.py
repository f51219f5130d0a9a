"""Keys scaled against queries: what a rotary embedding, none, or a norm in between allows, found by running, and exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dither.graph import KeyScaling, apply_key_scaling, discover_block, find_head_rotations, find_key_scalings
from dither.graph.exact import bench_copy, exact_calls, relative_difference, run_exactly
from graph.test_heads import block_calls
from tiny_models import build

HALF = [0, 1, 2, 3, 0, 1, 2, 3]  # the two halves of a head of 8 turn together
FREE = list(range(8))

# model -> block, (keys, queries, key heads, shared)
FOUND: dict[str, tuple[str, list[tuple[str, str, int, list[int]]]]] = {
    "llama": ("model.layers.1", [("self_attn.k_proj", "self_attn.q_proj", 2, HALF)]),
    "qwen2": ("model.layers.1", [("self_attn.k_proj", "self_attn.q_proj", 2, HALF)]),  # with biases
    "mixtral": ("model.layers.0", [("self_attn.k_proj", "self_attn.q_proj", 2, HALF)]),
    "opt": ("model.decoder.layers.0", [("self_attn.k_proj", "self_attn.q_proj", 4, FREE)]),  # positions are added to the stream
    "bert": ("bert.encoder.layer.1", [("attention.self.key", "attention.self.query", 4, FREE)]),
    "vit": ("vit.layers.1", [("attention.k_proj", "attention.q_proj", 4, FREE)]),
    "qwen3": ("model.layers.0", []),  # norms of queries and keys
    "phi3": ("model.layers.1", []),  # one fused matrix
}


def examined(name: str, tokens: int | None = None) -> tuple[nn.Module, Any, list[KeyScaling]]:
    model, sample = build(name)
    if tokens is not None:
        sample = {k: v[:, :tokens] for k, v in sample.items()}
    block, calls = block_calls(model, sample, FOUND[name][0])
    structure = discover_block(block, calls)
    sizes = sorted({h.size for h in find_head_rotations(block, calls, structure)})
    return block, calls, find_key_scalings(block, calls, structure, sizes)


@pytest.mark.parametrize("name", FOUND)
def test_found_where_true_and_exact(name: str) -> None:
    block, calls, found = examined(name)
    assert [(x.keys.name, x.queries.name, x.heads, x.shared.tolist()) for x in found] == FOUND[name][1]
    exact, calls = bench_copy(block), exact_calls(calls)
    generator = torch.Generator().manual_seed(0)
    for p in exact.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.3  # fresh biases are 0 and would hide a mistake
    before = run_exactly(exact, calls)
    for scaling in found:
        weights = {n: p.clone() for n, p in exact.named_parameters()}
        apply_key_scaling(exact, scaling, torch.rand(scaling.values, generator=generator, dtype=torch.float64) * 3 + 0.2)
        changed = {n for n, p in exact.named_parameters() if not torch.equal(p, weights[n])}
        expected = {scaling.keys.parameter, scaling.queries.parameter, scaling.keys.bias, scaling.queries.bias} - {None}
        assert changed == expected
    assert relative_difference(run_exactly(exact, calls), before) < 1e-9


def test_each_head_and_pair_has_its_own_factor() -> None:
    """Rows by hand: key head g times S_g, query heads 2 g and 2 g + 1 over it; both channels of a rotary pair alike."""
    block, _, (scaling,) = examined("llama")
    k, q = block.get_parameter("self_attn.k_proj.weight").clone(), block.get_parameter("self_attn.q_proj.weight").clone()
    s = torch.arange(1, 9, dtype=torch.float64)  # [2 heads, 4 pairs]
    apply_key_scaling(block, scaling, s)
    rows = s.view(2, 4).repeat(1, 2).view(-1).float()  # [2 heads, 2 halves, 4]
    assert torch.equal(block.get_parameter("self_attn.k_proj.weight"), k * rows[:, None])
    twice = rows.view(2, 1, 8).expand(2, 2, 8).reshape(-1, 1)
    assert torch.allclose(block.get_parameter("self_attn.q_proj.weight"), q / twice, rtol=1e-6)


def test_single_tokens_prove_nothing() -> None:
    assert examined("llama", tokens=1)[2] == []


def test_wrong_factors_are_refused() -> None:
    block, _, (scaling,) = examined("llama")
    with pytest.raises(ValueError, match=r"s must be \[8\], not \[16\]"):
        apply_key_scaling(block, scaling, torch.ones(16))
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="s must be positive"):
            apply_key_scaling(block, scaling, torch.full((8,), bad))
