"""quantize, eval, run, export and methods, as scripts call them: the last line of standard output is the promised object."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import dither
import tiny_folder
from dither.cli.main import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cli")
    tiny_folder.save(root / "model")
    (root / "text.txt").write_text(tiny_folder.text(60))
    return root


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Path:
    with pytest.raises(SystemExit) as done:
        main(
            [
                "quantize",
                str(folder / "model"),
                "--method",
                "rtn",
                "--group",
                "16",
                "--sym",
                "full",
                "-o",
                str(folder / "w4"),
            ]
        )
    assert done.value.code == 0
    return folder / "w4"


def call(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> tuple[str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as done:
        main([*map(str, arguments)])
    printed = capsys.readouterr()
    assert done.value.code == code, printed.err
    return printed.out, printed.err


def answer(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    """The object, which must be all of standard output."""
    out, _ = call(capsys, *arguments, "--json")
    assert out.count("\n") == 1
    return json.loads(out, parse_constant=pytest.fail)


def test_quantize(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    arguments = (
        "quantize",
        folder / "model",
        "--method",
        "awq+gptq",
        "--bits",
        3,
        "--group",
        20,
        "--calibration",
        folder / "text.txt",
    )
    arguments += ("--samples", 4, "--length", 32, "--seed", 1, "-o", tmp_path / "out")
    found = answer(capsys, *arguments)
    assert set(found) == {
        "checkpoint",
        "method",
        "bits_per_weight",
        "seconds",
        "cpu_seconds",
        "peak_memory_bytes",
        "notes",
    }
    assert (
        found["checkpoint"] == str(tmp_path / "out")
        and found["method"] == "awq+gptq"
        and 3 < found["bits_per_weight"] < 8
    )
    assert 0 < found["seconds"] < 120 and found["cpu_seconds"] > 0 and found["peak_memory_bytes"] > 10**7
    assert any("the last group" in note for note in found["notes"])
    dither.load(tmp_path / "out")
    again = answer(capsys, *arguments)
    assert again["bits_per_weight"] == found["bits_per_weight"] and any("already complete" in n for n in again["notes"])
    _, err = call(capsys, *arguments[:5], 4, *arguments[6:], code=2)
    assert "other settings" in err and "bits: 3 -> 4" in err
    out, err = call(capsys, *arguments, "--overwrite")
    assert "bits a weight" in out and "error" in err and "error" not in out  # progress goes to standard error


def test_recipe_files_and_overrides(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    call(
        capsys,
        "quantize",
        folder / "model",
        "--method",
        "rtn",
        "--group",
        "row",
        "--layer",
        "*down_proj=8:16",
        "--skip",
        "*k_proj",
        "-o",
        tmp_path / "a",
    )
    layers = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]["layers"]
    schemes = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]["schemes"]
    assert not any("k_proj" in name for name in layers)
    assert {schemes[e["scheme"]]["format"]["bits"] for n, e in layers.items() if "down_proj" in n} == {8}


@pytest.mark.parametrize("which", ["model", "w4"])
def test_eval(capsys: pytest.CaptureFixture[str], folder: Path, checkpoint: Path, which: str) -> None:
    arguments = ("eval", folder / which, "--text", folder / "text.txt", "--windows", 3, "--length", 48)
    found = answer(capsys, *arguments)
    assert set(found) == {"perplexity", "tokens", "seconds"} and found["tokens"] == 3 * 47
    model, tokenizer = dither.load(checkpoint) if which == "w4" else dither.load_float(folder / "model")
    expected = dither.perplexity(model, folder / "text.txt", tokenizer, windows=3, length=48)
    assert found["perplexity"] == expected.perplexity
    out, _ = call(capsys, *arguments)
    assert out.startswith(f"perplexity {expected.perplexity:.3f} on 3 windows of 48 tokens")
    out, err = call(capsys, *arguments[:4], "--length", 65, code=2)
    assert out == "" and "64 positions" in err


@pytest.mark.parametrize("which", ["model", "w4"])
def test_run(capsys: pytest.CaptureFixture[str], folder: Path, checkpoint: Path, which: str) -> None:
    arguments = ("run", folder / which, "few bits", "--max-tokens", 8, "--seed", 3, "--temperature", 2)
    found = answer(capsys, *arguments)
    assert {
        "text",
        "tokens_per_second",
        "tokens",
        "prompt_tokens",
        "stopped_by",
        "seconds",
        "prompt_seconds",
        "first_text_seconds",
        "seed",
    } == set(found)
    assert (
        found["prompt_tokens"] == 8 and found["tokens"] <= 8 and found["tokens_per_second"] > 0 and found["seed"] == 3
    )
    assert answer(capsys, *arguments)["text"] == found["text"]
    out, err = call(capsys, *arguments)
    assert out == found["text"] + "\n" and "tokens/s" in err
    others = {answer(capsys, *arguments[:5], "--seed", seed, "--temperature", 2)["text"] for seed in range(4)}
    assert len(others) > 1
    plain, fresh = (answer(capsys, *arguments[:5], *options)["text"] for options in ((), ("--frequency-penalty", 2, "--presence-penalty", 2)))
    assert len(set(fresh)) >= len(set(plain)) and len(set(fresh)) == len(fresh)


def test_run_stops_and_refuses(capsys: pytest.CaptureFixture[str], folder: Path, checkpoint: Path) -> None:
    text = answer(capsys, "run", checkpoint, "few", "--max-tokens", 12)["text"]
    stopped = answer(capsys, "run", checkpoint, "few", "--max-tokens", 12, "--stop", text[4:6], "--stop", "never so")
    assert stopped["text"] == text[: text.find(text[4:6])] and stopped["stopped_by"] == "stop"
    for arguments, message in (
        (("run", checkpoint, "x" * 80), "64 positions"),
        (("run", checkpoint, "few", "--chat", "--max-tokens", 2), "no chat template"),
    ):
        out, err = call(capsys, *arguments, code=2)
        assert out == "" and message in err and err.count("\n") == 1


def test_export(capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path) -> None:
    found = answer(capsys, "export", checkpoint, "--to", "compressed-tensors", "-o", tmp_path / "ct")
    assert found == {"out": str(tmp_path / "ct"), "format": "compressed-tensors", "notes": []}
    assert (tmp_path / "ct" / "model.safetensors").is_file()
    assert "not an empty folder" in call(capsys, "export", checkpoint, "-o", tmp_path / "ct", code=2)[1]


def test_export_to_other_formats(capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path) -> None:
    refused = call(capsys, "export", checkpoint, "--to", "gguf", "-o", tmp_path / "x", code=1)[1]
    assert "not whole blocks of 32" in refused and "can; " not in refused.split("gguf cannot")[0] and refused.count("\n") == 1
    found = answer(capsys, "export", checkpoint, "--to", "compressed-tensors", "--nearest", "--bits", "4", "-o", tmp_path / "ct")
    assert found["notes"] == []  # all fits, so nothing is re-encoded
    for options, message in ((("--bits", "5"), "4 or 8 bits"), (("--tokenizer", "smollm2"), "only gguf files")):
        assert message in call(capsys, "export", checkpoint, *options, "-o", tmp_path / "y", code=2)[1]


def test_methods(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "methods")
    assert {"awq", "gptq", "rtn"} <= set(found) and found["gptq"]["knobs"]["bits"]["default"] == 4
    out, _ = call(capsys, "methods", "gptq")
    assert out.startswith("gptq") and "--set" in out
