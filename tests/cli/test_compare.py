"""``dither compare``: how arms are written, what is printed, and what is refused. Rows are made up; tests/quant runs real ones."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

import tiny_folder
from dither import report
from dither.cli import compare as verb
from dither.cli.main import main
from dither.errors import UsageError
from dither.quant import compare
from dither.quant.compare import Arm
from dither.quant.machine import machine

PERPLEXITY = {"rtn": math.inf, "gptq": 23.0, "awq+gptq": 22.0}


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model on disk, and comparisons whose rows take no time: ``rtn`` diverges, ``awq`` fails."""
    from dither.quant.arm import ArmFailed
    from dither.quant.strict import strict

    def start(job: Any, log: Path, follow: Any, costs: Any) -> dict[str, Any]:
        if job.method is None:
            return {"perplexity": 20.0, "bits": 16, **machine()}
        if job.method == "awq":
            raise ArmFailed("no room")
        costs({"seconds": 1.0, "cpu_seconds": 2.0, "peak_memory_bytes": 10**9})
        facts = {"scheme": "int4", "bits_per_weight": 4.3, "perplexity": PERPLEXITY[job.method], "checkpoint_bytes": 1}
        layer = {"name": "layers.0.up", "block": 0, "shape": [8, 8], "scheme": "int4", "output_error": 0.1}
        found: dict[str, Any] = strict({**facts, "notes": [], "layers": [layer], **machine()})
        return found

    monkeypatch.setattr(compare, "start", start)
    tiny_folder.save(tmp_path / "model")
    return str(tmp_path / "model")


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as done:
        main(["compare", *map(str, arguments)])
    assert isinstance(done.value.code, int)
    return done.value.code


def test_json_is_the_record_on_the_last_line(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert call(model, "--methods", "rtn,gptq:clip=output,awq", "--bits", "4,3", "-o", out, "--json") == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    data = json.loads(last, parse_constant=pytest.fail)
    record = report.CompareRecord.model_validate_json(last)
    assert data["kind"] == "compare" and [row["bits"] for row in data["rows"]] == [4, 3] * 3
    assert data["rows"][0]["perplexity"] == "Infinity" and data["rows"][0]["excess_percent"] is None
    assert data["rows"][2]["method"] == "gptq clip=output"
    assert data["rows"][2]["excess_percent"] == pytest.approx(15.0)
    assert data["rows"][4]["status"] == "failed" and data["rows"][4]["reason"] == "no room"
    assert data["rows"][2]["layers"][0]["output_error"] == 0.1
    assert report.read_json(out / "compare.json") == record


def test_files_and_table(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert call(model, "--methods", "gptq,awq+gptq", "--bits", "4", "-o", out) == 0
    printed = capsys.readouterr().out
    assert "awq+gptq" in printed and str(out / "report.html") in printed
    assert (out / "table.csv").read_text().count("\n") == 4  # a head, the float model, two rows
    assert (out / "report.html").read_text().lower().startswith("<!doctype html>")
    assert (out / "plot.svg").read_text().startswith("<svg")


def test_another_comparison_in_the_folder_is_refused(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(model, "--methods", "gptq", "--bits", "4", "-o", tmp_path / "out", "--json") == 0
    assert call(model, "--methods", "gptq", "--bits", "4", "--samples", 8, "-o", tmp_path / "out") == 2
    assert "samples: 64 -> 8" in capsys.readouterr().err
    assert call(model, "--methods", "gptq", "--bits", "3", "-o", tmp_path / "out", "--json") == 0  # more rows of the same


def test_nothing_but_failures_is_a_failure(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(model, "--methods", "awq", "--bits", "4", "-o", tmp_path / "out", "--json") == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out.strip().splitlines()[-1])["rows"][0]["status"] == "failed"
    assert captured.err.strip().splitlines()[-1] == "dither: every row failed; the first: no room"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--methods", "gtpq"], "did you mean 'gptq'"),
        (["--methods", "gptq:dmap=1"], "did you mean 'damp'"),
        (["--methods", "gptq:clip"], "must be KNOB=VALUE"),
        (["--methods", "gptq:weights=3"], "no knob of the command line"),
        (["--methods", "gptq:bits=three"], "bits=three of gptq must be a number"),
        (["--methods", "gptq:bits=9"], "1 to 8"),
        (["--methods", ""], "unknown"),
        (["--bits", "9"], "1 to 8"),
        (["--bits", "four"], "numbers separated by commas"),
        (["--group", "0"], "positive number"),
        (["--join", "zip"], "must be 'none' or 'wikitext'"),
    ],
)
def test_wrong_calls_are_one_line_and_exit_code_2(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert call(model, "-o", tmp_path / "out", *arguments) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error and not (tmp_path / "out").exists()


def test_arms_are_every_method_at_every_width_and_group() -> None:
    assert verb.arms("rtn, awq+gptq", "4,3", "64,row") == [
        Arm(method, bits, group) for method in ("rtn", "awq+gptq") for bits in (4, 3) for group in (64, None)
    ]


def test_a_method_may_have_a_width_and_groups_of_its_own() -> None:
    assert verb.arms("rtn,gptq:bits=3:clip=output,awq:group=row", "4,2", "64") == [
        Arm("rtn", 4, 64), Arm("rtn", 2, 64), Arm("gptq", 3, 64, (("clip", "output"),)), Arm("awq", 4, None), Arm("awq", 2, None),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "spec, expected",
    [
        ("gptq", ("gptq", ())),
        ("gptq:clip=output:damp=0.05", ("gptq", (("clip", "output"), ("damp", 0.05)))),
        ("awq+gptq:gqa=true", ("awq+gptq", (("gqa", True),))),
        ('rtn:skip=["a:*", "b,c"]', ("rtn", (("skip", ["a:*", "b,c"]),))),
    ],
)
def test_knobs_follow_a_method(spec: str, expected: tuple[str, Any]) -> None:
    assert verb.method(spec) == expected
    assert [verb.method(part) for part in verb.split(f"{spec},rtn", ",")] == [expected, ("rtn", ())]


def test_knobs_need_names() -> None:
    with pytest.raises(UsageError, match="KNOB=VALUE"):
        verb.method("gptq:=3")


def test_help_tells_of_knobs(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--help") == 0
    assert "gptq:clip=output:damp=0.05" in "".join(capsys.readouterr().out.split())
