"""Causal attention in pieces against torch's own, in float64 and in bfloat16; what surrounds it is left as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dither.quant import attention
from dither.quant.attention import causal_attention, cheap_attention

SHAPES = [(1, 9, 3, 512, 64), (2, 4, 4, 300, 16), (1, 2, 1, 129, 8), (3, 6, 2, 64, 24), (1, 1, 1, 1, 4)]  # B, H, G, T, d


def operands(shape: tuple[int, int, int, int, int], dtype: torch.dtype, grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, groups, length, width = shape
    g = torch.Generator().manual_seed(0)

    def make(count: int, features: int) -> Tensor:  # heads behind tokens in memory, as models make them
        x = torch.randn(batch, length, count, features, generator=g, dtype=torch.float64).to(dtype).transpose(1, 2)
        return x.requires_grad_(grad)

    return make(heads, width), make(groups, width), make(groups, width + 2)


def reference(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    q, k, v = q.double(), k.double(), v.double()
    repeats = q.shape[1] // k.shape[1]
    return functional.scaled_dot_product_attention(
        q, k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1), is_causal=True, scale=scale
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_the_same_as_attention_over_everything(shape: tuple[int, int, int, int, int], scale: float | None) -> None:
    q, k, v = operands(shape, torch.float64)
    assert torch.allclose(causal_attention(q, k, v, scale), reference(q, k, v, scale), atol=1e-12)


@pytest.mark.parametrize("piece", [16, 128])
def test_pieces_change_nothing(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "PIECE", piece)
    monkeypatch.setattr(attention, "ROWS", 1)
    q, k, v = operands((1, 4, 2, 200, 8), torch.float64)
    assert torch.allclose(causal_attention(q, k, v), reference(q, k, v), atol=1e-12)


def test_gradients_pass() -> None:
    q, k, v = operands((1, 4, 2, 150, 8), torch.float64, grad=True)
    weights = torch.randn(1, 4, 150, 10, dtype=torch.float64)
    found = torch.autograd.grad((causal_attention(q, k, v) * weights).sum(), (q, k, v))
    wanted = torch.autograd.grad((reference(q, k, v) * weights).sum(), (q, k, v))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(found, wanted, strict=True))


def test_only_plainly_causal_bfloat16_calls_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(attention, "causal_attention", lambda q, k, v, scale: taken.append(1) or causal_attention(q, k, v, scale))
    theirs = functional.scaled_dot_product_attention
    q, k, v = operands((1, 2, 2, 200, 8), torch.bfloat16)
    mask = torch.zeros(200, 200, dtype=torch.bfloat16)
    with cheap_attention():
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        assert len(taken) == 1
        with cheap_attention():
            functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        assert len(taken) == 2
        functional.scaled_dot_product_attention(q, k, v)
        functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        functional.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
        functional.scaled_dot_product_attention(q[:, :, :100], k[:, :, :100], v[:, :, :100], is_causal=True)
        assert len(taken) == 2
    assert functional.scaled_dot_product_attention is theirs
    assert torch.allclose(out.double(), reference(q, k, v), atol=3e-2)
