"""Which calls of attention take dither's kernel within `cheap_attention`, and that everything else is as it was."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from dither.quant import attention
from dither.quant.attention import causal_attention, cheap_attention


def test_only_plainly_causal_bfloat16_calls_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(attention, "causal_attention", lambda q, k, v, scale: taken.append(1) or causal_attention(q, k, v, scale))
    theirs = functional.scaled_dot_product_attention
    q, k, v = (torch.randn(1, 2, 200, 8, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(i)) for i in range(3))
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
    wanted = theirs(q.double(), k.double(), v.double(), is_causal=True)
    assert torch.allclose(out.double(), wanted, atol=3e-2)
