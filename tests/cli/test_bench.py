"""``dither bench``: its list, its table, its record, and what it refuses. Rows are short; no time is judged."""

from __future__ import annotations

import json

import pytest

from dither.cli.bench import BENCHMARKS, parse_sizes, parse_threads
from dither.cli.main import main
from dither.errors import UsageError


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as done:
        main(["bench", *arguments])
    assert isinstance(done.value.code, int)
    return done.value.code


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert call() == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(BENCHMARKS)
    assert call("--json") == 0
    assert json.loads(capsys.readouterr().out)["softmax"]["sizes"] == BENCHMARKS["softmax"].sizes


def test_softmax(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("softmax", "--sizes", "4K:16K", "--threads", "1", "--rounds", "1") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "x 3-pass" in lines[2] and {line.split()[0] for line in lines[3:]} == {"4K", "16K"}
    assert call("softmax", "--sizes", "4K", "--threads", "1,2", "--rounds", "1", "--json") == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["benchmark"] == "softmax" and {row["threads"] for row in record["rows"]} == {1, 2} and record["machine"]["cpu"]


def test_sizes_and_threads() -> None:
    assert parse_sizes("4K:64K") == [4096, 16384, 65536] and parse_sizes("4K:60K") == [4096, 16384] and parse_sizes("1G") == [1 << 30]
    assert parse_sizes("4K, 1M,7") == [4096, 1 << 20, 7] and parse_threads("1, 2") == [1, 2]
    for text in ("", "4", "4k", "0:4K", "4K:", ":4K", "4K:8K:16K", "-4K", "1.5M", "8K:4K"):
        if text == "4":
            assert parse_sizes(text) == [4]
            continue
        with pytest.raises(UsageError, match=r"^--sizes "):
            parse_sizes(text)
    for text in ("", "0", "1,", "two", "-1"):
        with pytest.raises(UsageError, match=r"^--threads "):
            parse_threads(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["softmix"], "softmix"), (["softmax", "--sizes", "huge"], "--sizes huge"), (["softmax", "--threads", "0"], "--threads 0")],
)
def test_wrong_calls(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert call(*arguments) != 0
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
