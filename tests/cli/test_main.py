"""The command line's manners: exit codes, one line an error, pipes that close, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer

import tiny_folder
from dither.cli import main as cli

VERBS = ["quantize", "eval", "compare", "inspect", "run", "export", "claims", "methods", "demo", "swht"]


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as done:
        cli.main(list(arguments))
    printed = capsys.readouterr()
    assert isinstance(done.value.code, int)
    return done.value.code, printed.out, printed.err


WRONG = [
    (["frobnicate"], "No such command 'frobnicate'", "dither"),
    (["quantise"], "quantise", "dither"),
    (["--frob"], "No such option: --frob", "dither"),
    (["quantize"], "Missing argument 'model'", "dither quantize"),
    (["quantize", "m"], "Missing option '-o'", "dither quantize"),
    (["quantize", "m", "-o", "q", "--frob"], "No such option: --frob", "dither quantize"),
    (["quantize", "m", "-o", "q", "--bits", "four"], "'--bits'", "dither quantize"),
    (["quantize", "m", "-o", "q", "--samples", "0"], "'--samples'", "dither quantize"),
    (["eval", "m", "--windows", "0"], "'--windows'", "dither eval"),
    (["eval", "m", "--length", "1"], "'--length'", "dither eval"),
    (["run", "m"], "Missing argument 'prompt'", "dither run"),
    (["run", "m", "p", "--temperature", "-1"], "'--temperature'", "dither run"),
    (["run", "m", "p", "--top-p", "1.5"], "'--top-p'", "dither run"),
    (["run", "m", "p", "--max-tokens"], "--max-tokens", "dither"),
    (["run", "m", "p", "q"], "q", "dither run"),
    (["export", "m"], "Missing option '-o'", "dither export"),
    (["swht"], "Missing option '--npz'", "dither swht"),
]


@pytest.mark.parametrize(("arguments", "text", "verb"), WRONG, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_wrong_calls_are_one_line_and_exit_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], text: str, verb: str
) -> None:
    code, out, err = call(capsys, *arguments)
    assert (code, out) == (2, "") and err.count("\n") == 1 and err.startswith("dither: ")
    assert text in err and err.endswith(f"(see '{verb} --help')\n")


REFUSED = [
    (["quantize", "m", "-o", "q", "--bits", "9"], "--bits 9: must be 1 to 8", 2),
    (["quantize", "m", "-o", "q", "--group", "x"], "--group x", 2),
    (["quantize", "m", "-o", "q", "--method", "awx"], "did you mean 'awq'", 2),
    (["quantize", "m", "-o", "q", "--set", "damp"], "--set damp: must be KNOB=VALUE", 2),
    (["quantize", "m", "-o", "q", "--layer", "x=y"], "--layer x=y", 2),
    (["quantize", "./nowhere", "-o", "q"], "no such file or folder", 1),
    (["run", "m", ""], "the prompt is empty", 2),
    (["run", "m", "p", "--stop", ""], "--stop: a stop string is empty", 2),
    (["run", "m", "p", "--dtype", "int8"], "--dtype int8", 2),
    (["run", "./nowhere", "p"], "no such file or folder", 1),
    (["eval", "m", "--join", "x"], "--join x", 2),
    (["eval", "m", "--text", "./nowhere.txt"], "./nowhere.txt: there is no such text file".removeprefix("./"), 1),
    (["export", "./nowhere", "-o", "x"], "no finished checkpoint", 2),
    (["export", "./nowhere", "-o", "x", "--to", "zip"], "--to zip: is unknown", 2),
    (["methods", "awx"], "did you mean 'awq'", 2),
]


@pytest.mark.parametrize(
    ("arguments", "text", "exit_code"), REFUSED, ids=lambda v: " ".join(v) if isinstance(v, list) else ""
)
def test_refusals_are_one_line(
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    text: str,
    exit_code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capsys, *arguments)
    assert (code, out) == (exit_code, "") and text in err and err.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], *([verb, "--help"] for verb in VERBS)], ids=" ".join)
def test_help(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    code, out, err = call(capsys, *arguments)
    assert (code, err) == (0, "") and out.startswith("Usage: dither")
    assert len(arguments) != 2 or "Example: dither" in out or arguments[0] in ("claims", "compare", "demo")


def fail(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Make ``dither methods`` raise."""

    def broken(*arguments: Any) -> Any:
        raise error

    monkeypatch.setattr("dither.quant.recipes.find", broken)


def test_surprises_name_their_type_and_the_way_to_see_more(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(monkeypatch, KeyError("the\nsurprise"))
    code, _, err = call(capsys, "methods", "awq")
    assert code == 1 and err.startswith("dither: KeyError: ") and "--debug" in err and err.count("\n") == 1
    for arguments in (("--debug", "methods", "awq"), ("methods", "awq", "--debug"), ("methods", "--debug", "awq")):
        code, _, err = call(capsys, *arguments)
        assert code == 1 and "Traceback" in err and "KeyError" in err


def test_value_errors_of_others_are_surprises_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(monkeypatch, ValueError("theirs"))
    assert "ValueError: theirs (run again with --debug" in call(capsys, "methods", "awq")[2]
    fail(monkeypatch, OSError(28, "No space left on device", "x"))
    assert call(capsys, "methods", "awq")[2] == "dither: [Errno 28] No space left on device: 'x'\n"
    fail(monkeypatch, MemoryError())
    assert "lower --samples or --length" in call(capsys, "methods", "awq")[2]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), typer.Abort()], ids=["ctrl-c", "abort"])
def test_ctrl_c(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    fail(monkeypatch, error)
    assert call(capsys, "methods", "awq")[::2] == (1, "dither: stopped by Ctrl-C\n")
    monkeypatch.setattr("dither.quant.recipes.build", lambda *a: (_ for _ in ()).throw(error))
    code, _, err = call(capsys, "quantize", "smollm2", "-o", "q")
    assert code == 1 and "the same command goes on" in err and err.count("\n") == 1


def test_debug_after_two_dashes_is_text(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "methods", "--", "--debug")
    assert code == 2 and "--debug" in err and "Traceback" not in err


def run(*arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "dither.cli.main", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options
    )


def test_a_closed_pipe_is_left_quietly() -> None:
    with run("methods") as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait(60) == 1


def test_ctrl_c_in_the_middle_of_quantize_then_resume(tmp_path: Path) -> None:
    tiny_folder.save(tmp_path / "model")
    (tmp_path / "text.txt").write_text(tiny_folder.text(600))
    arguments = (
        "quantize",
        tmp_path / "model",
        "--method",
        "gptq",
        "--group",
        "16",
        "--calibration",
        tmp_path / "text.txt",
    )
    arguments += ("--samples", "128", "--length", "64", "--json", "-o", tmp_path / "out")  # type: ignore[assignment]
    with run(*arguments) as process:
        for _ in range(1200):
            if (tmp_path / "out" / ".partial" / "block-00001.safetensors").exists() or process.poll() is not None:
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    if process.returncode != 0:  # else it was done before the signal came
        assert (
            process.returncode == 1
            and out == ""
            and "stopped by Ctrl-C; the same command goes on" in err.splitlines()[-1]
        )
        assert "Traceback" not in err and not (tmp_path / "out" / "config.json").exists()
    with run(*arguments) as process:
        out, err = process.communicate(timeout=120)
    record = json.loads(out.splitlines()[-1])
    assert process.returncode == 0 and len(out.splitlines()) == 1
    assert set(record) == {
        "checkpoint",
        "method",
        "bits_per_weight",
        "seconds",
        "cpu_seconds",
        "peak_memory_bytes",
        "notes",
    }
    assert record["method"] == "gptq" and record["checkpoint"] == str(tmp_path / "out")
