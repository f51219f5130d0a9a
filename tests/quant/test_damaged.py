"""Damaged checkpoints: whatever is changed in a file, opening it gives a model or one line of an error, never a crash or a read out of bounds.

Mutations are structured, since random bytes hardly get past the first check: values in JSON (a header of safetensors, config.json) are exchanged for
hostile ones, keys are dropped, doubled or renamed, bytes are flipped, files cut. What still opens is run, so that the kernels see it too: under
`make sanitize` they run with AddressSanitizer.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dither
import tiny_folder
from dither.errors import DitherError
from dither.quant.evaluate import open_model
from dither.quant.recipes import GPTQ, LLMFP4, PBLLM, RTN, VPTQ

RECIPES: dict[str, Any] = {
    "gptq": GPTQ(bits=4, group=16),
    "codebook": VPTQ(centroids=16, residual=4, vector_len=2),
    "mixed": PBLLM(salient=0.2),
    "float inputs": LLMFP4(bits=4, act_bits=4, candidates=5, rounds=1),
    "few-bit cache": RTN(bits=3, group=8, act_bits=8, kv_bits=4),
}
HOSTILE: list[Any] = [
    0, 1, -1, 2, 3, 7, 8, 9, 15, 17, 31, 33, 63, 65, 255, 257, 2**31 - 1, 2**31, 2**63, -(2**63), 2**70, 0.5, 1e308, float("nan"), float("inf"),
    None, True, False, "", "x", "../x", "F64", "U8", "I64", "BF16", "é\x00", [], {}, [[]], [0], [1, 2, 3], [-1, 5], [2**40, 2**40], {"a": 1},
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(p for key, one in inner for p in places(one, (*path, key)))] if path else [p for key, one in inner for p in places(one, (key,))]


def changed(value: Any, draw: random.Random) -> Any:
    """The JSON value with one to three of its places changed."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        found = places(value)
        if not found:
            return draw.choice(HOSTILE)
        *outer, last = draw.choice(found)
        holder = value
        for key in outer:
            holder = holder[key]
        how = draw.random()
        if how < 0.5:
            holder[last] = copy.deepcopy(draw.choice(HOSTILE))
        elif how < 0.65 and isinstance(holder[last], int):
            holder[last] += draw.choice((-1, 1, 4, -4, 16))
        elif how < 0.8 and isinstance(holder, dict):
            holder[draw.choice((f"{last}x", "weight", "codes", "shape"))] = holder.pop(last)
        elif isinstance(holder, dict):
            del holder[last]
        else:
            holder.insert(last, copy.deepcopy(holder[last]))
    return value


def damage_json(path: Path, draw: random.Random) -> None:
    path.write_text(json.dumps(changed(json.loads(path.read_text(encoding="utf-8")), draw)), encoding="utf-8")


def damage_header(path: Path, draw: random.Random) -> None:
    """The JSON header of a safetensors file, its length made to fit or not."""
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.dumps(changed(json.loads(raw[8 : 8 + size]), draw)).encode()
    length = len(header) if draw.random() < 0.9 else draw.choice((0, 1, len(header) - 1, len(header) + 1, 2**40, 2**63, 2**64 - 1))
    path.write_bytes(struct.pack("<Q", length) + header + raw[8 + size :])


def damage_bytes(path: Path, draw: random.Random) -> None:
    raw = bytearray(path.read_bytes())
    how = draw.random()
    if how < 0.25:
        del raw[draw.randrange(len(raw)) :]
    elif how < 0.35:
        raw += draw.randbytes(draw.randrange(1, 64))
    else:
        for _ in range(draw.choice((1, 8, 64))):
            raw[draw.randrange(len(raw))] = draw.randrange(256)
    path.write_bytes(raw)


def damage_codes(path: Path, draw: random.Random) -> None:
    """Bytes of the tensors alone: codes, scales, masks and offsets that no quantizer wrote."""
    raw = bytearray(path.read_bytes())
    size = struct.unpack("<Q", raw[:8])[0]
    header = {k: v for k, v in json.loads(raw[8 : 8 + size]).items() if k != "__metadata__"}
    begin, end = draw.choice(list(header.values()))["data_offsets"]
    fill = draw.choice((0, 255, None))
    for at in range(8 + size + begin, 8 + size + end):
        raw[at] = draw.randrange(256) if fill is None else fill
    path.write_bytes(raw)


DAMAGES: list[tuple[str, Callable[[Path, random.Random], None]]] = [
    ("config.json", damage_json),
    ("config.json", damage_json),
    ("model.safetensors", damage_header),
    ("model.safetensors", damage_header),
    ("model.safetensors", damage_codes),
    ("model.safetensors", damage_bytes),
    ("config.json", damage_bytes),
    ("dither.json", damage_json),
    ("tokenizer.json", damage_json),
    ("generation_config.json", damage_json),
]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, recipe in RECIPES.items():
        source, out = tmp_path_factory.mktemp("float"), tmp_path_factory.mktemp("few") / "out"
        tiny_folder.save(source)
        (source / "text.txt").write_text(tiny_folder.text(), encoding="utf-8")
        dither.quantize(str(source), recipe, source / "text.txt", out, samples=4, length=32)
        made[name] = out
    return made


def outcome(folder: Path) -> str:
    """What a user sees: "runs", or the error's line. Anything else is raised."""
    try:
        model, _ = open_model(str(folder))
    except DitherError as error:
        return str(error)
    with torch.no_grad():
        model(input_ids=torch.arange(12)[None] % 90)
    return "runs"


def check(original: Path, seed: int, scratch: Path) -> str:
    draw = random.Random(seed)
    folder = scratch / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(original, folder)
    file, damage = draw.choice([d for d in DAMAGES if (folder / d[0]).is_file()])
    damage(folder / file, draw)
    found = outcome(folder)
    assert "\n" not in found and len(found) < 1200, f"seed {seed}: {found}"
    return found


@pytest.mark.parametrize("name", RECIPES)
def test_damage_is_an_error_or_harmless(name: str, originals: dict[str, Path], tmp_path: Path) -> None:
    assert outcome(originals[name]) == "runs"
    found = [check(originals[name], seed, tmp_path) for seed in range(40)]
    assert 0 < sum(one == "runs" for one in found) < len(found)


@pytest.mark.parametrize("name", RECIPES)
def test_kernels_never_see_odd_addresses(name: str, originals: dict[str, Path], tmp_path: Path) -> None:
    """Our files place each tensor at a multiple of its numbers' size; another file, of the same tensors, is copied to where kernels may read."""
    folder = tmp_path / "odd"
    shutil.copytree(originals[name], folder)
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    sizes = {"F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "U16": 2, "U8": 1, "I8": 1}
    assert size % 8 == 0 and all(v["data_offsets"][0] % sizes[v["dtype"]] == 0 for k, v in header.items() if k != "__metadata__")
    odd = json.dumps(header).encode()
    odd += b" " * (1 + -len(odd) % 8)
    path.write_bytes(struct.pack("<Q", len(odd)) + odd + raw[8 + size :])
    model, _ = open_model(str(folder))
    assert not [key for key, value in model.state_dict().items() if value.data_ptr() % value.element_size()]
    expected = open_model(str(originals[name]))[0]
    with torch.no_grad():
        assert torch.equal(model(torch.arange(12)[None]).logits, expected(torch.arange(12)[None]).logits)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_much_damage(name: str, originals: dict[str, Path], tmp_path: Path) -> None:
    for seed in range(1000, 1400):
        check(originals[name], seed, tmp_path)
