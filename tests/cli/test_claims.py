"""``dither claims``, with a claim that takes no time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dither import claims
from dither.claims.claim import Claim, Test
from dither.cli.main import main

QUICK = Claim(
    name="quick",
    sentence="figures grow with the seed",
    source="a paper",
    work="none",
    measure=lambda seed, say: {"figure": float(seed), "endless": float("inf")},
    tests=(Test("the mean is positive", lambda f: f["figure"] > 0), Test("it is above nine", lambda f: f["figure"] > 9)),
    data=lambda: "numbers",
    paper={"theirs": 7.25},
)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(claims.CLAIMS, "quick", QUICK)


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as done:
        main(["claims", *map(str, arguments)])
    assert isinstance(done.value.code, int)
    return done.value.code


def last(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1], parse_constant=pytest.fail)


def test_the_list_has_states(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--folder", tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(claims.CLAIMS) and all("not measured" in line for line in lines)
    assert call("run", "quick", "--folder", tmp_path) == 0
    capsys.readouterr()
    assert call("--folder", tmp_path, "--json") == 0
    records = last(capsys)
    assert records["quick"]["verdict"] == "holds in part" and records["awq"]["verdict"] == "not measured"


def test_run_prints_paper_measured_and_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("run", "quick", "--seeds", "1,3", "--folder", tmp_path) == 0
    printed = capsys.readouterr().out
    assert "theirs: 7.25" in printed and "figure: 2 +- 1.4" in printed and "seeds 1, 3" in printed
    assert "holds     the mean is positive" in printed and "FAILS     it is above nine" in printed
    assert "verdict: holds in part" in printed and str(tmp_path / "quick.json") in printed


def test_run_json_is_the_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("run", "quick", "--seeds", "2", "--folder", tmp_path, "--json") == 0
    record = last(capsys)
    assert record == json.loads((tmp_path / "quick.json").read_text())
    assert record["seeds"] == [2] and record["figures"]["endless"]["mean"] == "Infinity"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["run", "quik"], "did you mean 'quick'"),
        (["run"], "claims run: is no call"),
        (["walk", "quick"], "claims walk quick: is no call"),
        (["run", "quick", "--seeds", "one"], "--seeds one"),
        (["run", "quick", "--seeds", ""], "--seeds"),
    ],
)
def test_wrong_calls(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert call(*arguments, "--folder", tmp_path) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error and not list(tmp_path.iterdir())
