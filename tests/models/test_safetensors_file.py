"""Safetensors headers are believed only after they are checked."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dither import models
from dither.errors import CheckpointError
from dither.models.safetensors_file import DTYPES, read_header, read_tensor

Save = Callable[..., Path]
Tiny = Callable[..., Any]


def one_line(error: BaseException, path: Path) -> None:
    assert "\n" not in str(error) and path.name in str(error)


def split(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join(path: Path, header: dict[str, Any] | bytes, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    tensors = {"a": torch.arange(12.0).reshape(3, 4), "b": torch.ones(5, dtype=torch.float16), "c": torch.zeros(0, 2)}
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def test_every_dtype_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "all.safetensors"
    torch.manual_seed(0)
    tensors = {}
    for name, dtype in DTYPES.items():
        raw = torch.randint(0, 2 if dtype == torch.bool else 256, (6 * dtype.itemsize,), dtype=torch.uint8)
        tensors[name] = raw.view(dtype).reshape(2, 3)
    save_file(tensors, path)
    entries = read_header(path)
    for name, tensor in tensors.items():
        read = read_tensor(entries[name], name)
        assert read.dtype == tensor.dtype and read.shape == tensor.shape
        assert torch.equal(read.view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


def test_large_tensors_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dither.models.safetensors_file._PIECE", 64)
    path = tmp_path / "model.safetensors"
    tensor = torch.randn(37, 5)
    save_file({"t": tensor, "s": torch.tensor(3.0)}, path)
    entries = read_header(path)
    assert torch.equal(read_tensor(entries["t"], "t"), tensor)
    assert torch.equal(read_tensor(entries["t"], "t", torch.float64), tensor.double())
    assert torch.equal(read_tensor(entries["s"], "s"), torch.tensor(3.0))


def test_truncated_anywhere(tiny: Tiny, save: Save) -> None:
    folder = save(tiny("llama"))
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    draw = random.Random(0)
    for cut in [0, 7, 8, len(raw) - 1, *(draw.randrange(len(raw)) for _ in range(20))]:
        path.write_bytes(raw[:cut])
        with pytest.raises(CheckpointError) as caught:
            models.open(folder)
        one_line(caught.value, path)
    path.write_bytes(raw + b"\0")
    with pytest.raises(CheckpointError, match="tensors end at byte"):
        models.open(folder)


def test_cut_while_in_use(tiny: Tiny, save: Save) -> None:
    folder = save(tiny("llama"))
    source = models.open(folder)
    path = folder / "model.safetensors"
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)
    with pytest.raises(CheckpointError, match="ends inside tensor"):
        source.fill(source.skeleton())


def test_flipped_bits_in_the_header_are_found_or_harmless(small: Path) -> None:
    """A flip may rename a tensor or touch the free-text metadata; it never changes what is read for a name that is still known."""
    raw = small.read_bytes()
    expected = load_file(small)
    length = int.from_bytes(raw[:8], "little")
    found = 0
    for bit in range(8 * (8 + length)):
        damaged = bytearray(raw)
        damaged[bit // 8] ^= 1 << bit % 8
        small.write_bytes(damaged)
        try:
            entries = read_header(small)
        except CheckpointError as error:
            one_line(error, small)
            found += 1
            continue
        assert len(entries) == 3
        for name in set(entries) & set(expected):
            if expected[name].numel():  # an empty tensor fits any shape with a zero
                assert torch.equal(read_tensor(entries[name], name), expected[name]), name
    assert found > 0.8 * 8 * (8 + length)


def test_flipped_bits_in_a_model(tiny: Tiny, save: Save) -> None:
    """With a config to compare with, renamed tensors are found as well."""
    folder = save(tiny("llama"))
    path = folder / "model.safetensors"
    raw, expected = path.read_bytes(), load_file(path)
    header = int.from_bytes(raw[:8], "little")
    draw = random.Random(1)
    for _ in range(60):
        damaged = bytearray(raw)
        damaged[draw.randrange(8 + header)] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            source = models.open(folder)
        except CheckpointError as error:
            one_line(error, folder)
            continue
        for name, tensor in expected.items():
            assert torch.equal(source.tensor(name), tensor)


LIES: list[tuple[str, Any, str]] = [
    ("shape", [3, 5], "takes 60"),
    ("shape", [2**62, 2**62], "has 48 bytes"),
    ("shape", [-3, -4], "impossible shape"),
    ("shape", [3.0, 4.0], "impossible shape"),
    ("shape", [True, 12], "impossible shape"),
    ("shape", "3x4", "impossible shape"),
    ("shape", [1] * 40, "impossible shape"),
    ("shape", None, "impossible shape"),
    ("data_offsets", [0, 10**15], "lies at bytes"),
    ("data_offsets", [48, 0], "lies at bytes"),
    ("data_offsets", [-48, 0], "impossible data_offsets"),
    ("data_offsets", [0, 2**80], "impossible data_offsets"),
    ("data_offsets", [0], "impossible data_offsets"),
    ("data_offsets", [0, 40], "takes 48"),
    ("data_offsets", [4, 52], "gap|overlaps|end at"),
    ("dtype", "F31", "unknown dtype"),
    ("dtype", "F16", "takes 24"),
    ("dtype", 7, "unknown dtype"),
    ("dtype", ["F32"], "unknown dtype"),
    ("extra", 1, "has no dtype"),
]


@pytest.mark.parametrize(("field", "value", "says"), LIES)
def test_lies_about_a_tensor(field: str, value: Any, says: str, small: Path) -> None:
    header, data = split(small)
    name = next(n for n, e in header.items() if n == "a")
    header[name][field] = value
    join(small, header, data)
    with pytest.raises(CheckpointError, match=says) as caught:
        read_header(small)
    one_line(caught.value, small)
    assert "tensor " in str(caught.value)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"[]",
        b"7",
        b"null",
        b"{",
        b'{"a": 1}',
        b"\xff\xfe",
        b'{"a":{},"a":{}}',
        b"[" * 100_000,
        b'{"__metadata__": {"a": 1}}',
    ],
)
def test_headers_that_are_none(header: bytes, small: Path) -> None:
    join(small, header, b"")
    with pytest.raises(CheckpointError) as caught:
        read_header(small)
    one_line(caught.value, small)
    assert len(str(caught.value)) < 400 + len(str(small))


def test_a_header_length_beyond_the_file_costs_nothing(small: Path) -> None:
    small.write_bytes((2**63).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="claims 9223372036854775808 bytes"):
        read_header(small)


def test_shards_and_their_index(tiny: Tiny, save: Save) -> None:
    folder = save(tiny("llama"), "9KB")
    index = folder / "model.safetensors.index.json"
    good = index.read_text()
    shards = sorted(folder.glob("*.safetensors"))

    raw = shards[1].read_bytes()
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=f"names {re.escape(shards[1].name)}, which is not in the folder"):
        models.open(folder)
    shards[1].write_bytes(shards[0].read_bytes())
    with pytest.raises(CheckpointError, match="lacks the tensor"):
        models.open(folder)
    shards[1].write_bytes(raw)

    for bad, says in [
        ("{", "no index"),
        ("[]", "no index"),
        ("{}", "no index"),
        ('{"weight_map": {}}', "no map"),
        ('{"weight_map": {"a": 3}}', "no map"),
        ('{"weight_map": {"a": "../secret.safetensors"}}', "outside the folder"),
    ]:
        index.write_text(bad)
        with pytest.raises(CheckpointError, match=says) as caught:
            models.open(folder)
        one_line(caught.value, index)
    index.write_text(good)
    models.check_folder(folder)
    index.unlink()
    with pytest.raises(CheckpointError, match="neither"):
        models.open(folder)
