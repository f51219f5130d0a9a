"""Which calls of attention take dither's kernel within `cheap_attention`, and that everything else is as it was."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

import live_server
from dither.quant import attention
from dither.quant.attention import causal_attention, cheap_attention
from dither.quant.generate import Sampling, generate
from dither.serve.trial import stepper


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


def test_threads_may_come_and_go_in_any_order() -> None:
    theirs = functional.scaled_dot_product_attention
    one, other = cheap_attention(), cheap_attention()
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert functional.scaled_dot_product_attention is not theirs
    other.__exit__(None, None, None)
    assert functional.scaled_dot_product_attention is theirs


def test_prompts_are_read_by_it_and_say_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    net = live_server.model().bfloat16()
    prompt = "abc xyz " * 30  # longer than what is left to torch
    taken: list[int] = []
    real = attention.causal_attention
    monkeypatch.setattr(attention, "causal_attention", lambda q, k, v, scale: taken.append(q.shape[2]) or real(q, k, v, scale))
    found = generate(net, live_server.tokenizer(), prompt, Sampling(max_tokens=1))
    assert len(taken) == net.config.num_hidden_layers and set(taken) == {found.prompt_tokens}
    batch = stepper(net)
    ids = [3 + i % 90 for i in range(attention.SHORT + 9)]
    _, ours = batch.read(ids)
    with torch.inference_mode():
        torchs = net(input_ids=torch.tensor([ids])).logits[0, -1].float()
    assert (ours - torchs).norm() <= 0.05 * (torchs - torchs.mean()).norm()
