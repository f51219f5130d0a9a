"""Comparisons end to end on a tiny model: killed, gone on with, refused; every row made in a process of its own."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import tiny_folder
from dither import models
from dither.errors import CheckpointError, DitherError, UsageError
from dither.quant import arm as arm_module
from dither.quant import compare, perplexity
from dither.quant.arm import ArmFailed, Job
from dither.quant.compare import Arm, Setting
from dither.quant.machine import machine
from dither.quant.strict import dumps, strict
from dither.report import CompareRecord

RTN, GPTQ = Arm("rtn", 4, 16), Arm("gptq", 3, 16, (("clip", "output"),))
BROKEN = Arm("rtn", 2, None, (("skip", ["*"]),))  # passes every check before the run, and leaves nothing to quantize


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    """Here and in the processes that comparisons start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    tiny_folder.save(folder / "model")
    (folder / "calibration.txt").write_text(tiny_folder.text(seed=1))
    (folder / "text.txt").write_text(tiny_folder.text(seed=2))
    return folder


def setting(folder: Path, **changes: Any) -> Setting:
    values = {
        "model": str(folder / "model"),
        "calibration": str(folder / "calibration.txt"),
        "samples": 4,
        "length": 32,
        "seed": 0,
        "text": str(folder / "text.txt"),
        "join": "none",
        "windows": 3,
        "window_length": 48,
    }
    return Setting(**(values | changes))


def run(folder: Path, arms: list[Arm], lines: list[str] | None = None, **changes: Any) -> dict[str, Any]:
    evaluation = (folder / "text.txt").read_text()
    say = (lambda line: None) if lines is None else lines.append
    return compare.run(setting(folder, **changes), arms, folder / "out", evaluation=evaluation, say=say)


KILLED = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
import test_compare as t
t.run(Path(sys.argv[1]), [t.RTN, t.GPTQ])
"""


@pytest.fixture(scope="module")
def killed(folder: Path) -> tuple[int, int]:
    """A comparison killed while its second row is at work: when its first row was written, and who worked on the second."""
    here = Path(__file__).parent
    parent = subprocess.Popen([sys.executable, "-c", KILLED, str(folder), str(here), str(here.parent)])
    log = folder / "out" / "logs" / f"{GPTQ.name}.txt"
    until, children = time.monotonic() + 120, []
    while not children and time.monotonic() < until:  # the log is opened just before the worker starts
        assert parent.poll() is None, "the comparison ended before it could be killed"
        time.sleep(0.02)
        children = psutil.Process(parent.pid).children() if log.exists() else []
    (child,) = children
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    return (folder / "out" / "rows" / f"{RTN.name}.json").stat().st_mtime_ns, child.pid


@pytest.fixture(scope="module")
def result(folder: Path, killed: tuple[int, int]) -> tuple[dict[str, Any], list[str]]:
    lines: list[str] = []
    return run(folder, [RTN, GPTQ, BROKEN, RTN], lines), lines


def test_the_worker_dies_with_the_comparison(killed: tuple[int, int]) -> None:

    until = time.monotonic() + 20
    while psutil.pid_exists(killed[1]) and psutil.Process(killed[1]).status() != "zombie":
        assert time.monotonic() < until, "the row's process outlived the comparison"
        time.sleep(0.05)


def test_finished_rows_are_not_done_again(
    folder: Path, killed: tuple[int, int], result: tuple[dict[str, Any], list[str]]
) -> None:
    assert (folder / "out" / "rows" / f"{RTN.name}.json").stat().st_mtime_ns == killed[0]
    said = [line.partition(":")[0] for line in result[1] if line.endswith("quantizing and judging")]
    assert said == [GPTQ.name, BROKEN.name]


def test_rows_hold_what_reports_need(folder: Path, result: tuple[dict[str, Any], list[str]]) -> None:
    record = CompareRecord.model_validate(result[0])
    rtn, gptq, broken = record.rows  # an arm named twice is one row
    for row in (rtn, gptq):
        assert row.measured and row.excess_percent is not None
        assert len(row.layers) == 14 and all(layer.weight_error for layer in row.layers)
        assert row.checkpoint_bytes is not None and row.checkpoint_bytes > 10_000
        assert row.seconds is not None and row.cpu_seconds is not None
    assert gptq.method == "gptq clip=output" and gptq.scheme.startswith("int3")
    assert all(layer.output_error is not None and layer.tokens == 128 for layer in gptq.layers)
    assert rtn.bits_per_weight == 4 + (16 + 4) / 16  # a float16 scale and a zero point for each 16 codes
    assert not (folder / "out" / "checkpoints" / RTN.name).exists()
    assert broken.status == "failed" and broken.reason is not None and "no layer to quantize" in broken.reason
    assert "\n" not in broken.reason and broken.perplexity is None
    assert Arm("rtn", 4, None).title == "rtn" and record.notes == ()


def test_perplexities_are_those_of_direct_calls(folder: Path, result: tuple[dict[str, Any], list[str]]) -> None:
    import dither

    text = (folder / "text.txt").read_text()
    model, tokenizer = models.load(folder / "model")
    assert result[0]["float_perplexity"] == pytest.approx(
        perplexity(model, text, tokenizer, windows=3, length=48).perplexity, rel=1e-6
    )
    assert result[0]["float_bits_per_weight"] == 32
    q = dither.quantize(str(folder / "model"), dither.recipes.RTN(bits=4, group=16))
    found = perplexity(q, text, tokenizer, windows=3, length=48).perplexity
    assert result[0]["rows"][0]["perplexity"] == pytest.approx(found, rel=1e-4)


def test_a_rerun_gives_the_same_record_and_starts_nothing(
    folder: Path, result: tuple[dict[str, Any], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "start", lambda *given: pytest.fail("a finished row was done again"))
    again = run(folder, [RTN, GPTQ])
    assert again["rows"] == [strict(row) for row in result[0]["rows"][:2]]
    assert again["machine"] == result[0]["machine"] and again["date"] <= result[0]["date"]


def test_other_settings_are_refused_and_named(folder: Path, result: tuple[dict[str, Any], list[str]]) -> None:
    with pytest.raises(UsageError, match=r"samples: 4 -> 5; seed: 0 -> 1\).*choose another folder"):
        run(folder, [RTN], samples=5, seed=1)
    with pytest.raises(UsageError, match=r"the calibration text: .*calibration\.txt -> embedded text"):
        run(folder, [RTN], calibration=None)


def test_contents_count_not_paths(folder: Path, result: tuple[dict[str, Any], list[str]], tmp_path: Path) -> None:
    moved = tmp_path / "moved.txt"
    moved.write_text((folder / "calibration.txt").read_text())
    assert len(run(folder, [RTN], calibration=str(moved))["rows"]) == 1
    calibration = folder / "calibration.txt"
    before = calibration.read_text()
    try:
        calibration.write_text(before + "one more line\n")
        with pytest.raises(UsageError, match=r"the calibration text: the content of .*calibration\.txt changed"):
            run(folder, [RTN])
    finally:
        calibration.write_text(before)
    with pytest.raises(UsageError, match=r"the evaluation text: the content of"):
        compare.run(setting(folder), [RTN], folder / "out", evaluation="another text", say=lambda line: None)


def test_files_are_strict_json(folder: Path, result: tuple[dict[str, Any], list[str]]) -> None:
    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is no JSON")

    files = [*folder.glob("out/*.json"), *folder.glob("out/rows/*.json")]
    assert len(files) == 5
    for file in files:
        json.loads(file.read_text(), parse_constant=refuse)


def test_damaged_files_are_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "setting.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"setting\.json: is damaged"):
        compare.run(setting(folder), [RTN], tmp_path / "out", evaluation="text", say=lambda line: None)


@pytest.mark.parametrize(
    "arm, message",
    [
        (Arm("gtpq", 4, 16), "did you mean 'gptq'"),
        (Arm("gptq", 4, 16, (("dmap", 0.1),)), "did you mean 'damp'"),
        (Arm("gptq", 4, 16, (("damp", "much"),)), "damp"),
        (Arm("rtn+awq", 4, 16), "put it last"),
    ],
)
def test_wrong_arms_are_refused_before_anything_runs(folder: Path, tmp_path: Path, arm: Arm, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        compare.run(setting(folder), [RTN, arm], tmp_path / "none", evaluation="text", say=lambda line: None)
    assert not (tmp_path / "none").exists()


# -- rows made up: what the child says decides -----------------------------------------------------------------------------

OK = {"scheme": "int4", "bits_per_weight": 4.5, "perplexity": "Infinity", "checkpoint_bytes": 9, "notes": [], "layers": []}
COSTS = {"seconds": 1.0, "cpu_seconds": 2.0, "peak_memory_bytes": 3}


def made_up(monkeypatch: pytest.MonkeyPatch, answers: dict[str | None, Any]) -> None:
    def start(job: Job, log: Path, follow: Any, costs: Any) -> dict[str, Any]:
        answer = answers[job.method]
        if isinstance(answer, Exception):
            raise answer
        if job.method is not None and answer.pop("paid", True):
            costs(COSTS)
        return {**answer, **machine()}

    monkeypatch.setattr(compare, "start", start)


def test_diverged_rows_are_records_too(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up(monkeypatch, {None: {"perplexity": 20.0, "bits": 16}, "rtn": dict(OK)})
    data = compare.run(setting(folder), [RTN], tmp_path / "out", evaluation="text", say=lambda line: None)
    record = CompareRecord.model_validate(data)
    assert record.rows[0].perplexity == math.inf and record.rows[0].excess_percent is None
    assert record.rows[0].peak_memory_bytes == 3
    assert json.loads(record.model_dump_json())["rows"][0]["perplexity"] == "Infinity"


def test_failed_rows_are_tried_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = {"perplexity": 20.0, "bits": 16}
    made_up(monkeypatch, {None: base, "rtn": ArmFailed("disk full"), "gptq": dict(OK)})
    data = compare.run(setting(folder), [RTN, GPTQ], tmp_path / "out", evaluation="text", say=lambda line: None)
    assert [row["status"] for row in data["rows"]] == ["failed", "ok"] and data["rows"][0]["reason"] == "disk full"
    made_up(monkeypatch, {"rtn": dict(OK)})
    data = compare.run(setting(folder), [RTN, GPTQ], tmp_path / "out", evaluation="text", say=lambda line: None)
    assert [row["status"] for row in data["rows"]] == ["ok", "ok"]


def test_costs_are_unknown_where_the_work_was_interrupted(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up(monkeypatch, {None: {"perplexity": 20.0, "bits": 16}, "rtn": dict(OK, paid=False)})
    data = compare.run(setting(folder), [RTN], tmp_path / "out", evaluation="text", say=lambda line: None)
    row = CompareRecord.model_validate(data).rows[0]
    assert row.seconds is None and row.peak_memory_bytes is None and "several runs" in row.notes[-1]


def test_a_float_model_that_cannot_be_judged_ends_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up(monkeypatch, {None: ArmFailed("too short")})
    with pytest.raises(DitherError, match="cannot be judged \\(too short\\)"):
        compare.run(setting(folder), [RTN], tmp_path / "out", evaluation="text", say=lambda line: None)


# -- the child ---------------------------------------------------------------------------------------------------------------


def child(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str) -> Any:
    """`arm.start` with a child that runs ``code`` instead."""
    script = tmp_path / "child.py"
    script.write_text(code)
    whole = subprocess.Popen
    monkeypatch.setattr(arm_module.subprocess, "Popen", lambda args, **given: whole([sys.executable, script], **given))
    return lambda: arm_module.start(Job("m", "t", 1, 8), tmp_path / "log.txt", lambda *given: None, lambda costs: None)


def test_a_child_that_is_killed_is_told_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ArmFailed, match=r"SIGKILL \(out of memory\?\)"):
        child(monkeypatch, tmp_path, "import os, sys; sys.stdin.read(); os.kill(os.getpid(), 9)")()


def test_a_child_that_breaks_gives_its_last_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ArmFailed, match=r"exit code 3 \(the end\)"):
        child(monkeypatch, tmp_path, "import sys; sys.stdin.read(); print('the end', file=sys.stderr); sys.exit(3)")()



# -- names --------------------------------------------------------------------------------------------------------------------


def test_names_are_safe_and_distinct() -> None:
    arms = [
        Arm("gptq", 4, 64),
        Arm("gptq", 4, None),
        Arm("gptq", 4, 64, (("damp", 0.05),)),
        Arm("gptq", 4, 64, (("skip", ["a/b", "c"]),)),
        Arm("gptq", 4, 64, (("skip", ["a_b", "c"]),)),
        Arm("gptq", 4, 64, (("skip", ["x" * 300]),)),
    ]
    names = [arm.name for arm in arms]
    assert len(set(names)) == len(names)
    assert names[0] == "gptq-w4g64" and names[2] == "gptq-w4g64-damp=0.05"
    assert all("/" not in name and len(name) < 120 for name in names)


def test_strict_json() -> None:
    assert strict({1: (math.inf, -math.inf, math.nan, 1.5, None, True)}) == {
        "1": ["Infinity", "-Infinity", "NaN", 1.5, None, True]
    }
    assert dumps({"a": math.inf}) == '{"a": "Infinity"}'
    with pytest.raises(TypeError, match="set has no JSON form"):
        strict({1, 2})
