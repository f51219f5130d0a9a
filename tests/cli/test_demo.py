"""The demo with a tiny stand-in for the model; the real one carries the mark "slow"."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_folder
from dither.cli import demo as verb
from dither.cli.demo import Work, demo, export_and_load, foreign_text
from dither.errors import DitherError
from dither.report import read_json


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Work, Path, Any]:
    place = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)
        tiny_folder.save(place / "model")
        (place / "calibration.txt").write_text(tiny_folder.text(seed=1))
        (place / "text.txt").write_text(tiny_folder.text(seed=2))
        work = Work(
            model=str(place / "model"),
            methods=("gptq",),
            group=16,
            samples=4,
            length=32,
            windows=2,
            window_length=48,
            calibration=str(place / "calibration.txt"),
            text=str(place / "text.txt"),
        )
        return work, place / "out", demo(work, place / "out", lambda line: None, lambda done, blocks: None)


def test_everything_is_there(done: tuple[Work, Path, Any]) -> None:
    _, out, (record, facts) = done
    assert read_json(out / "compare.json") == record and record.rows[0].measured
    assert (out / "plot.svg").is_file() and (out / "report.html").is_file() and (out / "table.csv").is_file()
    config = json.loads((Path(facts["export"]) / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"


def test_the_export_says_what_the_checkpoint_says(done: tuple[Work, Path, Any]) -> None:
    import dither

    _, _, (_, facts) = done
    model, tokenizer = dither.load(facts["checkpoint"], dtype=torch.float32)
    ids = tokenizer(facts["prompt"], return_tensors="pt")["input_ids"]
    new = model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
    assert facts["foreign_text"] == tokenizer.decode(new, skip_special_tokens=True) != ""


def test_a_rerun_does_nothing_again(done: tuple[Work, Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    work, out, result = done
    monkeypatch.setattr(verb, "foreign_text", lambda exported: pytest.fail("the export was loaded again"))
    started = time.monotonic()
    assert demo(work, out, lambda line: None, lambda done, blocks: None) == result
    assert time.monotonic() - started < 10


def test_a_half_written_export_is_made_again(
    done: tuple[Work, Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "model.safetensors.tmp").write_bytes(b"half")
    monkeypatch.setattr(verb, "foreign_text", lambda exported: "hello")
    checkpoint = Path(done[2][1]["checkpoint"])
    assert export_and_load(checkpoint, tmp_path / "export", lambda line: None) == "hello"
    assert not (tmp_path / "export" / "model.safetensors.tmp").exists()


def test_the_foreign_process_cannot_import_dither() -> None:
    hidden = verb.FOREIGN.partition("from transformers")[0]
    ran = subprocess.run([sys.executable, "-c", hidden + "import dither"], capture_output=True, text=True)
    assert ran.returncode == 1 and "ModuleNotFoundError" in ran.stderr


def test_a_folder_that_does_not_load_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DitherError, match="transformers could not load the export") as caught:
        foreign_text(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_failed_row_fails_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dither.quant import compare
    from dither.quant.machine import machine

    corpus = {"text": "a", "windows": 1, "length": 8}
    row = {"method": "rtn", "bits": 4, "status": "failed", "reason": "no room"}
    data = {"model": "m", "calibration": corpus, "evaluation": corpus, "seed": 0, "rows": [row], **machine()}
    data |= {"float_perplexity": 9.0, "float_bits_per_weight": 16}
    monkeypatch.setattr(compare, "run", lambda *given, **more: data)
    with pytest.raises(DitherError, match=r"rtn, 4 bits, .*: no room"):
        demo(Work(), tmp_path, lambda line: None, lambda done, blocks: None)


@pytest.mark.slow
def test_the_real_demo(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dither.cli.main", "demo", "-o", str(tmp_path / "out"), "--json"]
    started = time.monotonic()
    first = subprocess.run(command, capture_output=True, text=True, check=True)
    took = time.monotonic() - started
    record = json.loads(first.stdout.strip().splitlines()[-1])
    perplexities = {row["method"]: row["perplexity"] for row in record["rows"]}
    assert record["float_perplexity"] < perplexities["awq+gptq"] < perplexities["gptq"] < perplexities["rtn"]
    assert "Paris" in record["foreign_text"]
    started = time.monotonic()
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(again.stdout.strip().splitlines()[-1]) == record
    assert time.monotonic() - started < min(60, took)
