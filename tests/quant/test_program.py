"""Recorded steps: the same scores as the model's own, for every architecture that can be recorded, and none for the others."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dither
import tiny_models
from dither.kernels.extension import extension
from dither.quant.program.instructions import Elementwise, Multiply, Record, same
from dither.quant.program.memory import Memory, placed
from dither.quant.program.program import Program, together
from dither.quant.program.proof import program_for
from dither.quant.program.recording import record
from dither.quant.program.stepper import ProgramStepper
from dither.quant.stepping import Stepper

REASONS = {"gemma2": "its cache", "mixtral": "writes into a tensor", "mamba": "AttentionInterface", "gpt2": "looks at its values"}

pytestmark = pytest.mark.skipif(extension() is None, reason="the C++ extension is not installed")


def few_bits(model: nn.Module, **knobs: Any) -> nn.Module:
    made: nn.Module = dither.quantize(model, dither.recipes.RTN(**{"bits": 4, "group": 16} | knobs)).model
    return made


def scores(stepper: Stepper, tokens: list[int]) -> list[Tensor]:
    found = [stepper.logits()]
    for token in tokens:
        stepper.append(token)
        found.append(stepper.logits())
    return found


@torch.inference_mode()
def check(model: nn.Module, tolerance: float, prompt: int = 9, steps: int = 12) -> None:
    ids = torch.arange(3, 3 + prompt)[None]
    tokens = [(7 * i) % 90 + 3 for i in range(steps)]
    stepper = ProgramStepper(model, ids, 99)
    ours, theirs = scores(stepper, tokens), scores(Stepper(model, ids), tokens)
    assert stepper.program is not None and torch.equal(ours[0], theirs[0])
    for own, their in zip(ours, theirs, strict=True):
        assert (own - their).norm() <= tolerance * (their - their.mean()).norm()


@pytest.mark.parametrize("name", tiny_models.RECORDED)
def test_scores_are_the_models_own(name: str) -> None:
    model, _ = tiny_models.build(name)
    check(model, 1e-5)
    check(few_bits(model), 1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt-neox"])
def test_in_bfloat16_and_with_a_few_bit_head(name: str) -> None:
    model = few_bits(tiny_models.build(name)[0], overrides={"*embed*": dither.formats.Int(8) @ dither.formats.group(16)})
    check(model.bfloat16(), 0.05)


@pytest.mark.parametrize(("name", "bits", "size"), [("fp4", 4, 32), ("nvfp4", 4, 16), ("mxfp4", 4, 32), ("fp8", 8, None)])
def test_layers_of_small_floats(name: str, bits: int, size: int | None) -> None:
    model = few_bits(tiny_models.build("llama")[0], format=name, bits=bits, group=size)
    check(model, 1e-4)
    check(model.bfloat16(), 0.05)


def test_keys_and_values_find_room_as_they_grow() -> None:
    check(tiny_models.build("llama")[0], 1e-5, prompt=3, steps=200)


@pytest.mark.parametrize("name", REASONS)
def test_other_models_are_stepped_as_they_are_and_say_why(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model, _ = tiny_models.build(name)
    with caplog.at_level(logging.DEBUG, "dither"):
        assert program_for(model) is None
    assert REASONS[name] in caplog.text
    with torch.inference_mode():
        ids, tokens = torch.arange(3, 9)[None], list(range(5, 25))
        ours, theirs = scores(ProgramStepper(model, ids, 20), tokens), scores(Stepper(model, ids), tokens)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt-neox"])
@pytest.mark.parametrize("knobs", [{"act_bits": 8}, {"act_bits": 8, "sym": "full", "group": 64}, {"bits": 8, "act_bits": 8, "group": None}], ids=str)
def test_layers_that_round_their_inputs(name: str, knobs: dict[str, Any]) -> None:
    """A rounding is no continuous function, so sums in another order show: as much as the last bit of inputs, now and then."""
    model = few_bits(tiny_models.build(name)[0], **knobs)
    check(model, 0.02)
    check(model.bfloat16(), 0.05)


@pytest.mark.parametrize("name", tiny_models.RECORDED)
@pytest.mark.parametrize("knobs", [{}, {"act_bits": 8}], ids=["weights", "inputs"])
@torch.inference_mode()
def test_prompts_are_read_as_the_model_reads_them(name: str, knobs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces, and stepped behind; as deep in bfloat16 as roundings there are apart."""
    monkeypatch.setattr("dither.quant.program.program.PIECE", 24)
    for dtype, tolerance in ((torch.float32, 0.02 if knobs else 1e-4), (torch.bfloat16, 0.08)):
        model = few_bits(tiny_models.build(name)[0], **knobs).to(dtype)
        program = program_for(model)
        assert program is not None and program.reads_prompts
        for length in (1, 24, 59):
            ids = [(11 * i) % 90 + 3 for i in range(length)]
            stepper, held = Stepper(model, torch.tensor([ids])), program.start(7)
            ours, theirs = [program.read(ids, held)], [stepper.logits()]
            for token in (5, 9):
                stepper.append(token)
                ours.append(program.step(token, held))
                theirs.append(stepper.logits())
            assert held.length == length + 2
            for own, their in zip(ours, theirs, strict=True):
                assert (own - their).norm() <= tolerance * (their - their.mean()).norm()


@torch.inference_mode()
def test_a_stepper_reads_long_prompts_by_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    model = few_bits(tiny_models.build("llama")[0])
    monkeypatch.setattr("dither.quant.program.stepper._LONG", 20)
    for length, tokens, by_program in ((20, 16, True), (19, 16, False), (20, 15, False)):
        ids = torch.arange(3, 3 + length)[None]
        stepper, theirs = ProgramStepper(model, ids, tokens), Stepper(model, ids).logits()
        found = stepper.logits()
        assert (found - theirs).norm() <= 1e-4 * theirs.norm() and torch.equal(found, theirs) != by_program
        assert (stepper.program is not None) == (tokens >= 16)


def test_dense_layers_are_not_for_prompts() -> None:
    program = program_for(tiny_models.build("llama")[0])
    assert program is not None and not program.reads_prompts


def test_inputs_that_are_not_finite_are_refused_as_layers_refuse_them() -> None:
    model = few_bits(tiny_models.build("llama")[0], act_bits=8)
    ids = torch.arange(3, 9)[None]
    with torch.inference_mode():
        stepper = ProgramStepper(model, ids, 99)
        stepper.logits()
        assert stepper.program is not None
        with torch.no_grad():
            model.get_parameter("model.layers.1.input_layernorm.weight")[5] = math.nan
        for own in (stepper, Stepper(model, ids)):
            own.append(7)
            with pytest.raises(ValueError, match="NaN or inf"):
                own.logits()
        assert stepper.program is not None and stepper.held is not None
        with pytest.raises(ValueError, match="NaN or inf"):
            stepper.program.read([3, 4], stepper.held)
        assert all(bool(row.isnan().all()) for row in stepper.program.step_rows([3, 4], [stepper.held.copy(), stepper.held.copy()]))


def test_few_bit_keys_other_inputs_and_other_grids_are_left_to_torch() -> None:
    offsets = dither.formats.Int(4, zero="float") @ dither.formats.group(16)
    for knobs in ({"act_bits": 8, "act_group": 16}, {"kv_bits": 8}, {"weights": offsets}):
        assert program_for(few_bits(tiny_models.build("llama")[0], **knobs)) is None, knobs


def test_a_program_lasts_until_a_weight_changes_and_not_with_hooks() -> None:
    model, _ = tiny_models.build("llama")
    first = program_for(model)
    assert first is not None and program_for(model) is first
    with torch.no_grad():
        model.get_parameter("model.norm.weight").mul_(2)
    second = program_for(model)
    assert second is not None and second is not first
    check(model, 1e-5)
    handle = model.get_submodule("model.norm").register_forward_hook(lambda *a: None)
    assert program_for(model) is None
    handle.remove()
    assert program_for(model) is second


def test_without_the_extension_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DITHER_KERNELS", "reference")
    assert program_for(tiny_models.build("llama")[0]) is None


class Complement(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.erfc(x)


class Shifted(nn.Module):
    """Differs from token to token, by a number that torch does not see."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        Shifted.calls += 1
        return x * float(Shifted.calls)


@pytest.mark.parametrize(("act", "why"), [(Complement, "erfc"), (Shifted, "depends on the place")])
def test_what_is_not_known_or_not_constant_is_refused(act: type[nn.Module], why: str, caplog: pytest.LogCaptureFixture) -> None:
    model, _ = tiny_models.build("llama")
    model.get_submodule("model.layers.0.mlp").act_fn = act()
    with caplog.at_level(logging.DEBUG, "dither"):
        assert program_for(model) is None
    assert why in caplog.text


def recorded(name: str = "llama") -> Record:
    return record(few_bits(tiny_models.build(name)[0]), 2, 3)


def test_records_differ_where_numbers_do() -> None:
    model, _ = tiny_models.build("llama")
    one = record(model, 2, 3)
    assert same(one, record(model, 2, 8))
    changed = record(model, 2, 3)
    at = next(i for i, x in enumerate(changed.instructions) if isinstance(x, Elementwise) and isinstance(x.b, float))
    old = changed.instructions[at]
    assert isinstance(old, Elementwise) and isinstance(old.b, float)
    changed.instructions[at] = Elementwise(old.function, old.y, old.a, old.b + 1)
    assert not same(one, changed)
    with torch.no_grad():
        again = record(model, 2, 3)
        held = next(x.weight for x in again.instructions if isinstance(x, Multiply))
        assert isinstance(held, Tensor)
        assert same(one, again)


def test_products_of_one_row_stand_together() -> None:
    groups = [g for g in together(recorded().instructions) if isinstance(g[0], Multiply)]
    assert [len(g) for g in groups] == [3, 1, 2, 1] * 2 + [1]


def test_memory_is_used_again_but_never_by_two_at_once() -> None:
    """The same bits as with memory of its own for every tensor; and by the intervals themselves."""
    draw = torch.Generator().manual_seed(0)
    first = dict(enumerate(sorted(torch.randint(0, 50, (200,), generator=draw).tolist())))
    last = {k: f + n for (k, f), n in zip(first.items(), torch.randint(0, 9, (200,), generator=draw).tolist(), strict=True)}
    sizes = dict(enumerate(torch.randint(1, 500, (200,), generator=draw).tolist()))
    places, total = placed(first, last, sizes)
    for a in first:
        assert places[a] >= 0 and places[a] + sizes[a] <= total
        for b in range(a):
            together_ = first[a] <= last[b] and first[b] <= last[a]
            assert not together_ or places[a] + sizes[a] <= places[b] or places[b] + sizes[b] <= places[a]
    found = recorded()
    memory = Memory(found, together(found.instructions))
    assert memory.buffer.shape[1] < sum(memory.sizes.values()) / 3
    assert Program(found).scores[0].shape == (tiny_models.VOCABULARY,)
