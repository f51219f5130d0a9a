"""``dither serve`` as a process: what it says, how it ends, what it refuses."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from openai import APIError, OpenAI

import tiny_folder
from dither.cli import main as cli
from dither.serve.server import bind


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    tiny_folder.save(path)
    return path


@contextmanager
def serving(*arguments: object) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """The process, and what it said once it was ready."""
    command = [sys.executable, "-m", "dither.cli.main", "serve", *map(str, arguments), "--json"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job of a shell would ignore it
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        yield process, json.loads(line) if line else {}
    finally:
        process.kill()
        process.communicate()


def test_serves_until_ctrl_c(folder: Path) -> None:
    """Ctrl-C ends streams with their reason, the process with one line, and frees the port."""
    with serving(folder, "--port", 0, "--slots", 3) as (process, said):
        assert (said["model"], said["slots"], said["context"]) == ("tiny", 3, 64) and said["url"].startswith("http://127.0.0.1:")
        client = OpenAI(base_url=said["url"], api_key="none", max_retries=0)
        ask: dict[str, Any] = {"model": "tiny", "prompt": "a", "max_tokens": 8, "logit_bias": {"2": -100}}
        assert client.completions.create(**ask).usage.completion_tokens == 8
        streams = [client.completions.create(**ask | {"max_tokens": 60}, stream=True, n=16, logprobs=5) for _ in range(4)]
        process.send_signal(signal.SIGINT)
        with pytest.raises(APIError, match="shutting down"):
            for stream in streams:
                list(stream)
        out, err = process.communicate(timeout=20)
        assert process.returncode == 1 and out == "" and "Traceback" not in err
        first, *_, last = err.splitlines()
        assert first.startswith("tiny at http://127.0.0.1:") and last == "dither: stopped by Ctrl-C"
    bind("127.0.0.1", int(said["url"].split(":")[2].split("/")[0])).close()


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[object, str]:
    with pytest.raises(SystemExit) as done:
        cli.main(["serve", *map(str, arguments)])
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    return done.value.code, printed.err


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert fails(capsys, folder, "--port", port) == (1, f"dither: port {port} of 127.0.0.1 is taken; choose another with --port, or 0 for any\n")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--host", "0.0.0.0"], 2, "--host 0.0.0.0: anybody who reaches it could use the model; give --api-key too"),
        (["--host", "no such host", "--api-key", "x"], 1, "--host no such host: is no address"),
        (["--host", "192.0.2.1", "--api-key", "x", "--port", "0"], 1, "cannot listen at port 0 of 192.0.2.1"),
        (["--api-key", " "], 2, "--api-key: is empty"),
        (["--slots", "0"], 2, "--slots"),
        (["--port", "70000"], 2, "--port"),
    ],
)
def test_refusals(capsys: pytest.CaptureFixture[str], folder: Path, arguments: list[str], code: int, words: str) -> None:
    found, error = fails(capsys, folder, *arguments)
    assert found == code and words in error


def test_models_that_cannot(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    assert fails(capsys, tmp_path / "nothing", "--port", 0)[0] == 1
    for path in folder.iterdir():
        if not path.name.startswith("tokenizer"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    assert "without a tokenizer" in fails(capsys, tmp_path, "--port", 0)[1]


def test_what_to_install(capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.startswith("dither.serve.") or n.partition(".")[0] == "uvicorn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert fails(capsys, folder) == (1, "dither: dither serve needs uvicorn: pip install 'dither[serve]'\n")
