"""The claim of PB-LLM: its layer errors on a tiny model against errors through the layers themselves, and its arms with the model replaced."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tiny_models
from dither.claims import pb_llm
from dither.formats import Int, PartialBinary, group
from dither.quant.chain import block_chain
from dither.quant.rounding.partial_binary import partial_binary

TOKENS = torch.randint(3, tiny_models.VOCABULARY, (12, 40), generator=torch.Generator().manual_seed(0))


def test_statistics_are_those_of_each_layers_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pb_llm, "_batches", lambda tokens: iter(tokens.split(5)))
    model, _ = tiny_models.build("llama")
    chain = block_chain(model)
    assert chain is not None
    block = chain[1][1]
    layers = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
    found = pb_llm.gather(model, block, list(layers.values()), TOKENS)
    seen: dict[nn.Module, torch.Tensor] = {}
    handles = [m.register_forward_pre_hook(lambda m, a: seen.__setitem__(m, a[0].flatten(0, 1))) for m in layers.values()]
    with torch.no_grad():
        model(input_ids=TOKENS)
    for handle in handles:
        handle.remove()
    assert found.keys() == set(layers.values()) and len({id(s) for s in found.values()}) == 4  # qkv, o, gate and up, down
    for layer, statistics in found.items():
        x = seen[layer].double()
        assert statistics.tokens == len(x) == 12 * 40
        torch.testing.assert_close(statistics.hessian, x.T @ x / len(x), rtol=1e-4, atol=1e-6)


def test_layer_errors_are_those_of_the_outputs() -> None:
    model, _ = tiny_models.build("llama")
    figures = pb_llm.layer_errors(model, TOKENS)
    assert len(figures) == len(pb_llm.SHARES) * len(pb_llm.ARMS)
    chain = block_chain(model)
    assert chain is not None
    layers = [m for m in chain[0][1].modules() if isinstance(m, nn.Linear)]
    found = pb_llm.gather(model, chain[0][1], layers, TOKENS)
    error = base = 0.0
    for layer in layers:
        weight, h = layer.weight.detach(), found[layer].hessian
        mine, plain = partial_binary(weight, h, PartialBinary(0.3)).dequantize(), (Int(2) @ group(64)).quantize(weight)
        errors = [float(torch.trace(d @ h @ d.T)) for d in ((mine - weight).double(), (plain - weight).double())]
        error, base = error + errors[0], base + errors[1]
    assert figures["layer GPTQ hessian 0.3"] == pytest.approx(error / base, rel=1e-6)


def test_arms_and_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def measured(recipe: object, seed: int, say: object, label: str) -> dict[str, float]:
        asked.append(label)
        return {f"{label} perplexity": 100.0, f"{label} bits": 2.0}

    monkeypatch.setattr(pb_llm, "measured", measured)
    monkeypatch.setattr(pb_llm, "float_perplexity", lambda: 18.0)
    monkeypatch.setattr(pb_llm, "_float_model", lambda: (tiny_models.build("llama")[0], None))
    monkeypatch.setattr(pb_llm, "texts", lambda: (TOKENS, "", ""))
    figures = pb_llm.measure(0, lambda text: None)
    assert asked[:3] == ["PB-GPTQ 10 %", "PB-GPTQ 30 %", "PB-GPTQ 50 %"] and len(asked) == 8
    falling, binary, rtn = pb_llm.CLAIM.tests[3:]
    assert not any(t.passes(figures) for t in (falling, binary, rtn))
    figures |= {"PB-GPTQ 10 % perplexity": 50, "PB-GPTQ 30 % perplexity": 30, "PB-GPTQ 50 % perplexity": 20, "binary perplexity": 1000}
    assert all(t.passes(figures) for t in (falling, binary, rtn))
    for test in pb_llm.CLAIM.tests[:3]:
        test.passes(figures)
