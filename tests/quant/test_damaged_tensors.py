"""Damaged quantized tensors that are multiplied: a file either gives one line of an error, or numbers with which the C++ kernels compute what
decoding them says, and never read out of bounds.

``test_damaged.py`` opens whole checkpoints, most of which are refused early. Here a file holds one tensor, and what still opens is multiplied and
looked up, by every kernel and instruction set; and models whose weights were changed in memory are stepped by several threads. ``DITHER_MUTATIONS``
files for each kind of damage: 2000 under ``make sanitize``.
"""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dither
import tiny_models
from dither.errors import CheckpointError
from dither.formats import Int, Log, QTensor, Scheme, WeightScheme, channel, group, token
from dither.quant.inputs import InputRounding
from dither.quant.linear import QuantEmbedding, QuantLinear, QuantWeight
from dither.quant.program.stepper import ProgramStepper
from kernels.conftest import ISAS, use
from quant.test_cpu_products import BOOKS, FLOATS, PARTIAL, matrix, stored
from quant.test_damaged import changed, damage_bytes, damage_codes, damage_header

MUTATIONS = int(os.environ.get("DITHER_MUTATIONS", "160"))
INTEGERS = [
    *(Int(bits) @ group(20) for bits in range(1, 9)),
    *(Int(bits, sym="full", scale="bfloat16") @ group(32) for bits in range(1, 9)),
    Int(4, zero="float") @ group(16),
    Int(3, sym=True, scale="float32") @ channel(),
    Int(4, scale="e8m0") @ group(8),
    Log(4) @ group(16),
]
SCHEMES: list[WeightScheme] = [*INTEGERS, *FLOATS, *PARTIAL, *BOOKS]
INPUTS = replace(Int(8, sym=True) @ token(), dynamic=True)
ROWS, COLUMNS = 24, 40
EXTREME = (0, 1, 0x7F, 0x80, 0xFF)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[WeightScheme, bytes]:
    """The file of a tensor of every scheme."""
    path, found = tmp_path_factory.mktemp("tensors") / "t.safetensors", {}
    for scheme in SCHEMES:
        stored(scheme, ROWS, COLUMNS).save(path)
        found[scheme] = path.read_bytes()
    return found


def damage_scheme(path: Path, draw: random.Random) -> None:
    """The scheme and the shape, which stand in the header's metadata as JSON."""
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    header["__metadata__"]["qtensor"] = json.dumps(changed(json.loads(header["__metadata__"]["qtensor"]), draw))
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])


def damage_values(path: Path, draw: random.Random) -> None:
    """A few bytes of one tensor: the smallest ones too (offsets, groups, places, scales) are hit as often as the codes."""
    raw = bytearray(path.read_bytes())
    size = struct.unpack("<Q", raw[:8])[0]
    tensors = [v["data_offsets"] for k, v in json.loads(raw[8 : 8 + size]).items() if k != "__metadata__"]
    begin, end = draw.choice([(a, b) for a, b in tensors if b > a])
    for _ in range(draw.choice((1, 1, 2, 8))):
        raw[8 + size + draw.randrange(begin, end)] = draw.choice((*EXTREME, draw.randrange(256)))
    path.write_bytes(raw)


def reach(held: QTensor) -> Tensor:
    """What a kernel's sums are made of, ``[O, I]``: of integers, code and zero point apart, so a sum may be small where its terms are not."""
    found = held.dequantize().double().abs()
    if isinstance(held.scheme, Scheme) and isinstance(held.scheme.format, Int):
        for fill in (0, 255):
            codes = torch.full_like(held.stored["codes"], fill)
            found += QTensor.trusted({**held.stored, "codes": codes}, held.scheme, held.shape).dequantize().double().abs()
    return found


def multiplied(held: QTensor, draw: random.Random) -> None:
    """Its product, with few rows and many, is what its decoded weight gives in float64; so is each of its rows."""
    inputs = InputRounding(INPUTS) if draw.random() < 0.2 else None
    layer = QuantLinear(held.scheme, held.shape[1], held.shape[0], None, held.tensors(), inputs=inputs)
    weight, span = held.dequantize().double(), reach(held)
    dtype, limit = draw.choice(((torch.float32, 2.0**-17), (torch.bfloat16, 2.0**-7)))
    for count in (1, draw.choice((2, 3, 8)), draw.choice((9, 33))):
        x = matrix(count, held.shape[1], seed=count).to(dtype)
        with torch.no_grad():
            found, rounded = layer(x), x if inputs is None else inputs(x)
        size = rounded.double().abs() @ span.T
        wrong = (found.double() - rounded.double() @ weight.T).abs() > limit * size + 1e-30
        assert not bool((wrong & (size < 1e30)).any()), f"{held.scheme}: {count} rows of {dtype}"
    if isinstance(held.scheme, Scheme) and held.shape[0]:
        table = QuantEmbedding(held.scheme, *held.shape, tensors=held.tensors())
        index = torch.tensor([0, held.shape[0] - 1, held.shape[0] // 2])
        assert torch.equal(table(index).nan_to_num(), held.dequantize()[index].nan_to_num())


def outcome(path: Path, draw: random.Random) -> str:
    try:
        held = QTensor.load(path)
    except CheckpointError as error:
        return str(error)
    multiplied(held, draw)
    return "multiplied"


@pytest.mark.parametrize("damage", [damage_scheme, damage_header, damage_values, damage_codes, damage_bytes], ids=lambda d: d.__name__)
def test_damage_is_an_error_or_multiplied(
    damage: Any, originals: dict[WeightScheme, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, found = tmp_path / "t.safetensors", []
    paths = [isa for isa in ISAS if _runs(isa, monkeypatch)]
    for seed in range(MUTATIONS):
        draw = random.Random(seed)
        scheme = SCHEMES[seed % len(SCHEMES)]
        use(monkeypatch, draw.choice(paths))
        path.write_bytes(originals[scheme])
        damage(path, draw)
        try:
            found.append(outcome(path, draw))
        except Exception as error:
            raise AssertionError(f"seed {seed}, {scheme}: {type(error).__name__}: {error}") from error
        assert "\n" not in found[-1] and len(found[-1]) < 1200, f"seed {seed}: {found[-1]}"
    opened = found.count("multiplied")
    assert opened < len(found) or damage is damage_codes
    assert opened > (len(found) // 3 if damage in (damage_values, damage_codes) else 0)


def _runs(isa: str, monkeypatch: pytest.MonkeyPatch) -> bool:
    try:
        use(monkeypatch, isa)
    except pytest.skip.Exception:
        return False
    return True


# -- whole steps ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def _damaged(weights: list[QuantWeight], draw: random.Random) -> dict[tuple[QuantWeight, str], Tensor]:
    """Changes bytes in place; what was there before."""
    before = {}
    for weight in draw.sample(weights, draw.choice((1, 2, 5))):
        name, buffer = draw.choice(sorted(weight.named_buffers(recurse=False)))
        before[weight, name] = buffer.clone()
        flat = buffer.view(torch.uint8).reshape(-1)
        for _ in range(draw.choice((1, 8, flat.numel()))):
            flat[draw.randrange(flat.numel())] = draw.choice((*EXTREME, draw.randrange(256)))
        weight._apply(lambda t: t)  # forgets what was made of the old bytes
    return before


@pytest.mark.parametrize("bits", [3, 4])
def test_damaged_models_are_stepped(bits: int, three_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of a whole step, whose threads share rows, with codes and scales that no quantizer wrote."""
    use(monkeypatch, "avx2")
    table = Int(4, sym=True) @ group(16)
    model = dither.quantize(
        tiny_models.build("llama")[0], dither.recipes.RTN(bits=bits, group=16, overrides={"model.embed_tokens": table, "lm_head": table})
    ).model
    weights = [module for module in model.modules() if isinstance(module, QuantWeight)]
    stepped = 0
    for seed in range(max(6, MUTATIONS // 40)):
        draw = random.Random(seed)
        before = _damaged(weights, draw)
        try:
            for weight, _ in before:
                weight.check()
            with torch.inference_mode():
                stepper = ProgramStepper(model, torch.arange(3, 8)[None], 24)
                for step in range(8):
                    stepper.append(3 + (seed + 5 * step) % 90)
                    stepper.logits()
            stepped += stepper.program is not None
        except CheckpointError as error:
            assert "NaN or inf" in str(error)
        finally:
            for (weight, name), value in before.items():
                weight.get_buffer(name).copy_(value)
                weight._apply(lambda t: t)
    assert stepped > 0
