"""Sequences stepped together give, to the last bit, the scores that each has alone; models that cannot are stepped one by one."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import dither
import live_server
import tiny_models
from dither.formats import Int, QTensor, channel, group
from dither.kernels.extension import extension
from dither.quant.linear import QuantLinear, decoded
from dither.quant.program.stepper import ProgramStepper
from dither.quant.stepping import Stepper
from dither.serve.batch import Batch, ByProgram, OneByOne, SideBySide
from dither.serve.trial import of_the_model, stepper

# Models whose rows meet: experts are given the tokens of all rows at once, states are no keys and values, positions come from masks; and one whose
# rotary embedding is 2 wide, so that 8 rows fill no two vectors.
ALONE = {"stablelm", "mixtral", "qwen2-moe", "qwen3-moe", "gpt-oss", "bloom", "falcon", "falcon-new", "mamba", "mamba2"}


def texts(batch: Batch[Any], count: int, steps: int, seed: int = 0, company: int = 1) -> dict[int, list[torch.Tensor]]:
    """Scores of ``count`` greedy sequences of random prompts, each stepped in the company of up to ``company`` that come and go at random."""
    draw = random.Random(seed)
    prompts = [[draw.randrange(3, tiny_models.VOCABULARY) for _ in range(1 + 3 * i)] for i in range(count)]
    waiting, active, found = list(range(count)), {}, {i: list[torch.Tensor]() for i in range(count)}
    draw = random.Random(company)
    with torch.inference_mode(), decoded(batch.model, few_rows=True):
        while waiting or active:
            if waiting and len(active) < company and (not active or draw.random() < 0.5):
                i = waiting.pop(draw.randrange(len(waiting)))
                active[i], logits = batch.read(prompts[i])
                found[i].append(logits)
            order = draw.sample(sorted(active), len(active))
            for at in range(0, len(order), batch.rows):
                chosen = order[at : at + batch.rows]
                rows = batch.step([active[i] for i in chosen], [int(found[i][-1].argmax()) for i in chosen])
                for i, logits in zip(chosen, rows, strict=True):
                    found[i].append(logits)
                    if len(found[i]) > steps:
                        del active[i]
    return found


def same(a: dict[int, list[torch.Tensor]], b: dict[int, list[torch.Tensor]]) -> bool:
    return a.keys() == b.keys() and all(len(a[i]) == len(b[i]) and all(map(torch.equal, a[i], b[i])) for i in a)


@pytest.mark.parametrize("name", tiny_models.LANGUAGE)
def test_company_changes_no_bit(name: str) -> None:
    batch = of_the_model(live_server.model(name, positions=None))
    assert isinstance(batch, OneByOne if name in ALONE else SideBySide), batch.why
    assert bool(batch.why) == (name in ALONE)
    alone = texts(batch, 9, 12)
    assert same(texts(batch, 9, 12, company=3), alone) and same(texts(batch, 9, 12, company=9), alone)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma2", "opt"])
def test_alone_is_what_the_model_says_itself(name: str) -> None:
    net = live_server.model(name, positions=None)
    prompt = [5, 9, 11, 40, 41, 42, 43, 44, 45]
    with torch.inference_mode():
        plain, expected = Stepper(net, torch.tensor([prompt])), []
        for _ in range(20):
            expected.append(plain.logits())
            plain.append(int(expected[-1].argmax()))
    batch = of_the_model(net)
    assert isinstance(batch, SideBySide)
    with torch.inference_mode():
        state, logits = batch.read(prompt)
        for e in expected:
            assert torch.allclose(logits, e, atol=1e-5 * float(e.abs().max()), rtol=0)
            (logits,) = batch.step([state], [int(e.argmax())])


@pytest.mark.parametrize("name", tiny_models.LANGUAGE)
def test_models_that_have_a_program_are_stepped_by_it(name: str) -> None:
    """Company changes no bit, and scores are those of `generate`'s own steps."""
    if extension() is None:
        pytest.skip("needs the kernels")
    net = live_server.model(name, positions=None)
    batch = stepper(net)
    assert isinstance(batch, ByProgram) == (name in tiny_models.RECORDED)
    if not isinstance(batch, ByProgram):
        return
    alone = texts(batch, 9, 12)
    assert same(texts(batch, 9, 12, company=3), alone) and same(texts(batch, 9, 12, company=9), alone)
    prompt = [5, 9, 11, 40, 41, 42, 43, 44, 45]
    with torch.inference_mode():
        plain = ProgramStepper(net, torch.tensor([prompt]), 99)
        state, logits = batch.read(prompt)
        for _ in range(20):
            assert torch.equal(logits, plain.logits())
            token = int(logits.argmax())
            plain.append(token)
            (logits,) = batch.step([state], [token])


def test_copies_go_ways_of_their_own() -> None:
    """Beside each other, past the end of their room, and as a sequence that was read anew."""
    if extension() is None:
        pytest.skip("needs the kernels")
    batch = stepper(live_server.model(positions=None))
    assert isinstance(batch, ByProgram)
    with torch.inference_mode():
        one, _ = batch.read([5, 6, 7])
        batch.step([one], [8])
        two = one.copy()
        anew, _ = batch.read([5, 6, 7])
        batch.step([anew], [8])
        for i in range(3 * one.capacity):
            first, second, third = batch.step([one, two, anew], [9 + i % 3, 12 + i % 5, 12 + i % 5])
            assert torch.equal(second, third) and not torch.equal(first, second)


SETTINGS: list[dict[str, Any]] = [
    {"bits": 4, "group": 16},
    {"bits": 3, "group": None},
    {"bits": 4, "group": 16, "act_bits": 8},
    {"bits": 4, "group": 16, "kv_bits": 4},
    {"format": "fp4", "group": 16},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_few_bits(settings: dict[str, Any]) -> None:
    net = dither.quantize(live_server.model(), dither.recipes.RTN(**settings)).model
    batch = of_the_model(net)
    assert isinstance(batch, SideBySide), batch.why
    alone = texts(batch, 9, 12)
    assert same(texts(batch, 9, 12, company=8), alone)
    with torch.inference_mode():
        cache = batch.read([5, 6, 7])[0].cache
    kinds = {type(layer).__name__ for layer in cache.layers}
    assert kinds == {"FewBitLayer" if "kv_bits" in settings else "GrowingLayer"}


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_a_row_of_codes_does_not_feel_the_others(monkeypatch: pytest.MonkeyPatch, isa: str, bits: int) -> None:
    if extension() is None:
        pytest.skip("needs the kernels")
    monkeypatch.setenv("DITHER_ISA", isa)
    for blocks, width in ((group(16), 40), (group(64), 576), (channel(), 80)):
        scheme, w = Int(bits) @ blocks, torch.randn(24, width, generator=torch.Generator().manual_seed(bits))
        params = scheme.fit(w)
        layer = QuantLinear.replace(QTensor.from_codes(scheme.encode(w, params), params, scheme), None)
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(8, width, generator=torch.Generator().manual_seed(1)).to(dtype)
            alone = torch.cat([layer(x[i : i + 1]) for i in range(8)])
            for count in range(2, 9):
                for start in range(9 - count):
                    assert torch.equal(layer(x[start : start + count]), alone[start : start + count])


@pytest.mark.slow
def test_smollm2_at_four_bits() -> None:
    """The embedded model: eight texts of different lengths come and go, and none feels the others; `generate` says the same."""
    net = dither.quantize("smollm2", dither.recipes.RTN(bits=4, group=64)).model
    for way in (stepper, of_the_model):
        batch = way(net)
        assert isinstance(batch, ByProgram if way is stepper else SideBySide), batch.why
        alone = texts(batch, 10, 24)
        for company in (2, 5, 10):
            assert same(texts(batch, 10, 24, company=company), alone)
    narrow = of_the_model(net.bfloat16())
    assert isinstance(narrow, SideBySide) and not narrow.fill, narrow.why
    assert same(texts(narrow, 9, 12, company=8), texts(narrow, 9, 12))
