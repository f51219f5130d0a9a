"""What goes wrong around a command: damaged models, full and read-only disks, Ctrl-C. One line, the right exit code, no traceback, and
nothing left behind that looks like a whole checkpoint.

Wrong calls are in `test_main`; missing models, short calibration texts and a limit on file sizes in ``quant/test_engine``.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import dither
import tiny_folder
from dither.cli import main as cli
from dither.errors import ModelError

SETTINGS = ("--method", "rtn", "--bits", "4", "--group", "16", "--json")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original") / "model"
    tiny_folder.save(folder)
    return folder


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(original, tmp_path / "model"))


@pytest.fixture
def weights(model: Path) -> Path:
    return model / "model.safetensors"


class Ended:
    """How a command ended: in a process of its own, or in this one, which spares the imports."""

    def __init__(self, code: object, out: str, err: str) -> None:
        self.code, self.out = code, out
        self.lines = [line for line in err.splitlines() if not line.startswith("quantize ")]  # without progress

    def refuses(self, out: Path, *words: str, code: int = 1) -> None:
        assert (self.code, self.out, len(self.lines)) == (code, "", 1), (self.code, self.out, self.lines)
        assert self.lines[0].startswith("dither: ") and all(word in self.lines[0] for word in words), self.lines[0]
        assert not (out / "config.json").exists()
        with pytest.raises(ModelError):
            dither.load(out)

    def succeeds(self, out: Path) -> None:
        assert self.code == 0, self.lines
        assert json.loads(self.out)["checkpoint"] == str(out)


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "dither.cli.main", *map(str, arguments)]


def process(*arguments: object) -> Ended:
    done = subprocess.run(command(*arguments), capture_output=True, text=True)
    return Ended(done.returncode, done.stdout, done.stderr)


def here(capsys: pytest.CaptureFixture[str], *arguments: object) -> Ended:
    capsys.readouterr()
    with pytest.raises(SystemExit) as done:
        cli.main([*map(str, arguments)])
    printed = capsys.readouterr()
    return Ended(done.value.code, printed.out, printed.err)


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# -- damaged models ------------------------------------------------------------------------------------------------------


def header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Write the file again with another header before the same data."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    found = json.loads(raw[8 : 8 + length])
    change(found)
    text = json.dumps(found).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


NORM = "model.norm.weight"


def no_config(folder: Path) -> str:
    (folder / "config.json").unlink()
    return "has no config.json"


def flipped_length(folder: Path) -> str:
    path = folder / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[5] ^= 0x10
    path.write_bytes(raw)
    return "is no whole safetensors file"


def absurd_shape(folder: Path) -> str:
    header(folder / "model.safetensors", lambda h: h[NORM].update(shape=[2**40, 2**40]))
    return f"tensor {NORM}"


def absurd_offsets(folder: Path) -> str:
    header(folder / "model.safetensors", lambda h: h[NORM].update(data_offsets=[2**50, 2**50 + 128]))
    return f"tensor {NORM}"


def nan_in_the_last_block(folder: Path) -> str:
    tensors, name = load_file(folder / "model.safetensors"), "model.layers.1.mlp.down_proj.weight"
    tensors[name][3, 4] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return name


@pytest.mark.parametrize("damage", [no_config, flipped_length, absurd_shape, absurd_offsets, nan_in_the_last_block])
def test_damaged_models(damage: Callable[[Path], str], model: Path, tmp_path: Path) -> None:
    says = damage(model)
    process("quantize", model, *SETTINGS, "-o", tmp_path / "out").refuses(tmp_path / "out", "model", says)


def test_truncated_at_random_lengths(
    capsys: pytest.CaptureFixture[str], model: Path, weights: Path, tmp_path: Path
) -> None:
    raw, draw = weights.read_bytes(), random.Random(0)
    for length in [0, len(raw) - 1, *(draw.randrange(len(raw)) for _ in range(20))]:
        weights.write_bytes(raw[:length])
        ended = here(capsys, "quantize", model, *SETTINGS, "-o", tmp_path / "out")
        ended.refuses(tmp_path / "out", str(weights), "damaged or incomplete")


def test_flipped_bits_in_the_header_are_refused_or_change_nothing(
    capsys: pytest.CaptureFixture[str], model: Path, weights: Path, tmp_path: Path
) -> None:
    here(capsys, "quantize", model, *SETTINGS, "-o", tmp_path / "good").succeeds(tmp_path / "good")
    good = (tmp_path / "good" / "model.safetensors").read_bytes()
    raw, draw = weights.read_bytes(), random.Random(0)
    length, refused = int.from_bytes(raw[:8], "little"), 0
    for i in range(30):
        damaged = bytearray(raw)
        damaged[draw.randrange(8 + length)] ^= 1 << draw.randrange(8)
        weights.write_bytes(damaged)
        out = tmp_path / f"out-{i}"
        ended = here(capsys, "quantize", model, *SETTINGS, "-o", out)
        if ended.code == 0:
            assert (out / "model.safetensors").read_bytes() == good
        else:
            ended.refuses(out, "model")
            refused += 1
    assert refused >= 20


LIES: list[dict[str, Any]] = [
    {"shape": [-1, -32]},
    {"shape": []},
    {"shape": [2**62] * 4},
    {"shape": "[32]"},
    {"data_offsets": [10**9, 10**9 + 128]},
    {"data_offsets": [128, 0]},
    {"data_offsets": [0, 2**70]},
    {"data_offsets": None},
    {"dtype": "F4096"},
    {"dtype": "F64"},
]


@pytest.mark.parametrize("lie", LIES, ids=str)
def test_headers_that_lie(
    capsys: pytest.CaptureFixture[str], lie: dict[str, Any], model: Path, weights: Path, tmp_path: Path
) -> None:
    header(weights, lambda h: h[NORM].update(lie))
    here(capsys, "quantize", model, *SETTINGS, "-o", tmp_path / "out").refuses(tmp_path / "out", NORM)


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", torch.zeros(8, 8).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "model.gguf"


@pytest.mark.parametrize("count", [3, 10**6, 2**63])
@pytest.mark.parametrize(("place", "what"), [(8, "tensors"), (16, "metadata fields")])
def test_gguf_with_lying_counts(
    capsys: pytest.CaptureFixture[str], count: int, place: int, what: str, gguf_file: Path, tmp_path: Path
) -> None:
    raw = bytearray(gguf_file.read_bytes())
    raw[place : place + 8] = struct.pack("<Q", count)
    gguf_file.write_bytes(raw)
    words = [f"claims {count} {what}"] if count > 3 else []  # three are possible, until the file is read
    call = ("quantize", gguf_file, *SETTINGS, "-o", tmp_path / "out")
    ended = process(*call) if count == 2**63 else here(capsys, *call)
    ended.refuses(tmp_path / "out", str(gguf_file), *words)


# -- disks ---------------------------------------------------------------------------------------------------------------


def mount(*arguments: object) -> None:
    """Skips the test where this process may not mount."""
    try:
        done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")


@contextmanager
def tmpfs(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir()
    mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_full_disk_then_more_room(capsys: pytest.CaptureFixture[str], original: Path, tmp_path: Path) -> None:
    """Disks of 4, 12, 20 ... KB, full at every place where they can be, the last within ``config.json``. With more room, the same command
    ends as if nothing had been.
    """
    call = ("quantize", original, *SETTINGS, "-o")
    here(capsys, *call, tmp_path / "good").succeeds(tmp_path / "good")
    found: set[str] = set()
    for size in range(4, 400, 8):
        with tmpfs(tmp_path / f"{size}k", f"{size}k") as disk:
            out = disk / "out"
            ended = process(*call, out) if size == 4 else here(capsys, *call, out)
            if ended.code == 0:
                break
            ended.refuses(out, str(out), "no space left", "the same command again")
            found |= set(content(out))
            mount("-o", "remount,size=10m", disk)
            here(capsys, *call, out).succeeds(out)
            assert content(out) == content(tmp_path / "good")
    assert {".partial/block-00001.safetensors", "model.tmp", "dither.json.tmp", "config.json.tmp"} <= found


@pytest.mark.parametrize("begun", [False, True])
def test_read_only_output(capsys: pytest.CaptureFixture[str], begun: bool, original: Path, tmp_path: Path) -> None:
    """From the start, or since an earlier run left its blocks there."""
    call = ("quantize", original, *SETTINGS, "-o")
    with tmpfs(tmp_path / "disk", "48k" if begun else "1m") as disk:
        if begun:
            here(capsys, *call, disk / "out").refuses(disk / "out", "no space left")
        mount("-o", "remount,ro", disk)
        before = content(disk)
        ended = here(capsys, *call, disk / "out") if begun else process(*call, disk / "out")
        ended.refuses(disk / "out", str(disk / "out"), "cannot be written", "-o")
        assert content(disk) == before and bool(before) == begun


# -- Ctrl-C --------------------------------------------------------------------------------------------------------------


def test_ctrl_c_then_the_same_command_gives_the_same_bytes(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tiny_folder.tokenizer().save_pretrained(tmp_path / "model")
    call = ("quantize", tmp_path / "model", "--method", "awq+gptq", "--bits", "3", "--group", "16", "--json")
    call += ("--samples", "8", "--length", "32", "-o")
    process(*call, tmp_path / "undisturbed").succeeds(tmp_path / "undisturbed")

    out, deadline = tmp_path / "out", time.monotonic() + 120
    with subprocess.Popen(
        command(*call, out),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job of a shell would ignore it
    ) as running:
        while not (out / ".partial" / "block-00003.safetensors").exists() and time.monotonic() < deadline:
            assert running.poll() is None
            time.sleep(0.005)
        running.send_signal(signal.SIGINT)
        printed, told = running.communicate(timeout=120)
    Ended(running.returncode, printed, told).refuses(out, "stopped by Ctrl-C", "the same command goes on")
    finished = [name for name in os.listdir(out / ".partial") if name.endswith(".safetensors")]
    assert 4 <= len(finished) < 17

    again = process(*call, out)
    again.succeeds(out)
    assert any(note.startswith("resumed: ") for note in json.loads(again.out)["notes"])
    assert content(out) == content(tmp_path / "undisturbed")
