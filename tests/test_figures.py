"""The figures in README.md and docs/ are those of the stored records, and come there by ``benchmarks/readme.py`` alone."""

from __future__ import annotations

import importlib.util
import json
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dither import claims
from dither.claims.claim import RECORDS
from dither.report import CompareRecord, Corpus, LayerRow, Machine, Row, to_json

ROOT = Path(__file__).resolve().parent.parent


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("readme_figures", ROOT / "benchmarks" / "readme.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


readme = _load()
RECORD = CompareRecord(
    model="made-up",
    calibration=Corpus(text="valid", windows=64, length=512),
    evaluation=Corpus(text="test", windows=16, length=2048),
    float_perplexity=18.25,
    float_bits_per_weight=16,
    machine=Machine(cpu="Example CPU", threads=2, versions={"dither": "0.1.0"}),
    seed=0,
    date=datetime(2026, 11, 24, tzinfo=UTC),
    rows=(
        Row(method="gptq", bits=4, group=64, bits_per_weight=4.31, perplexity=20.75, layers=(LayerRow(name="l"),)),
        Row(method="rtn", bits=2, group=64, bits_per_weight=2.31, perplexity=float("inf")),
    ),
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(f"# made up\n\n{readme.BEGIN}\nstale words\n{readme.END}\n\nmore\n")
    to_json(RECORD, tmp_path / "compare.json")
    return tmp_path


def call(root: Path, *arguments: str) -> int:
    code: int = readme.main(list(arguments), root, root / "records")
    return code


def test_a_record_becomes_the_table_and_the_plot(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(root, str(root / "compare.json")) == 0
    text = (root / "README.md").read_text()
    assert text.startswith(f"# made up\n\n{readme.BEGIN}\n| method") and text.endswith(f"{readme.END}\n\nmore\n")
    assert "20.75" in text and "diverged" in text and "stale words" not in text
    assert "Example CPU with 2 threads" in text and "2026-11-24" in text and "test, 16 windows of 2048 tokens" in text
    assert (root / "docs" / "plot.svg").read_text().startswith("<svg")
    assert "layers" in json.loads((root / "docs" / "record.json").read_text())["rows"][0]
    assert call(root, str(root / "compare.json")) == 0 and (root / "README.md").read_text() == text
    assert call(root, "--check") == 0


def test_a_figure_typed_by_hand_is_found(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(root, str(root / "compare.json")) == 0
    path = root / "README.md"
    path.write_text(path.read_text().replace("20.75", "19.75"))
    assert call(root, "--check") == 1
    assert "README.md: is not what the records give" in capsys.readouterr().err
    assert call(root, str(root / "compare.json")) == 0 and call(root, "--check") == 0
    (root / "docs" / "plot.svg").unlink()
    assert call(root, "--check") == 1


def test_claims_become_a_page(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        call(root, "--claims")
    record: dict[str, Any] = {
        "claim": "awq",
        "sentence": "Scales help.",
        "source": "a paper, table 3",
        "work": "a small model",
        "data": "a text",
        "paper": {"theirs": 6.24},
        "figures": {
            "ours": {"mean": 30.7, "spread": 0.25, "values": [30.5, 30.9]},
            "lost": {"mean": "Infinity", "spread": None, "values": ["Infinity", "Infinity"]},
        },
        "tests": [{"says": "it helps", "holds": True}, {"says": "it is free", "holds": False}],
        "verdict": "holds in part",
        "caveat": "It is small.",
        "seeds": [0, 1],
        "seconds": 90.0,
        "machine": {"cpu": "Example CPU", "threads": 2, "versions": {"dither": "0.1.0"}},
        "date": "2026-11-24T00:00:00+00:00",
    }
    claims.save(record, root / "records")
    assert call(root, "--claims") == 0
    page = (root / "docs" / "claims.md").read_text()
    assert "| [awq](#awq) | holds in part | 1 of 2 | 2026-11-24 |" in page
    assert "- holds: it helps" in page and "- **does not hold**: it is free" in page
    assert "| theirs | 6.24 |" in page and "| ours | 30.7 | 0.25 |" in page and "| lost | not finite |" in page
    assert call(root, "--check") == 0 and "stale words" in (root / "README.md").read_text()
    (root / "docs" / "claims.md").write_text(page.replace("30.7", "29.7"))
    assert call(root, "--check") == 1


def test_the_record_of_softmax_becomes_tables_and_a_plot(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        call(root, "--special")
    (root / "docs" / "special.md").write_text("# made up\n\n<!-- softmax:begin -->\nstale words\n<!-- softmax:end -->\n")
    folder = root / "benchmarks" / "records"
    folder.mkdir(parents=True)
    names = ("two_pass", "recompute", "reload", "online", "torch")
    row = {"bytes": 4096, "numbers": 1024, "isa": "avx2", "threads": 1, "auto": "reload", "seconds": dict.fromkeys(names, 1.024e-6),
           "streams": {"copy": 1e-6}, "bytes_a_second": {"two_pass": 1e9}}  # fmt: skip
    machine = {"cpu": "Example CPU", "threads": 2, "versions": {"dither": "0.1.0"}}
    part = {"machine": machine, "date": "2026-11-28T00:00:00+00:00", "caches": [1024], "rows": [row, row | {"bytes": 8192}]}
    (folder / "softmax.json").write_text(json.dumps({"float32": part}))
    assert call(root, "--check") == 1
    assert call(root, "--special") == 0 and call(root, "--check") == 0
    page = (root / "docs" / "special.md").read_text()
    assert page.startswith("# made up") and "| 4 KiB | avx2 | 1 | 1.000 |" in page and "stale words" not in page
    assert (root / "docs" / "softmax.svg").read_text().startswith("<svg")


def test_the_records_of_log_bessel_become_tables_and_a_plot(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("log_bessel", "log_bessel_gpu", "von_mises_fisher")
    page = root / "docs" / "special.md"
    page.write_text("".join(f"<!-- {name}:begin -->\nstale words\n<!-- {name}:end -->\n" for name in names))
    folder = root / "benchmarks" / "records"
    folder.mkdir(parents=True)
    errors = {"maximum": 1.5e-15, "quantile_999": 7e-16, "median": 4e-17}
    both = {"points": 1000, "cells": {"number": 2, "v_decades": [-3, 6], "x_decades": [-4, 8], "I": [0, 1e-16, 1e-15, 1e-13], "K": [0, 0, 0, 0]}}
    for kind in ("I", "K"):
        both[kind] = errors | {"ratio": errors, "sets": {"wide": errors | {"points": 1000}}}
    rows = [
        {"function": "I", "range": "small", "cores": 2, "seconds": 1e-8, "seconds_on_all_cores": 6e-9, "scipy_seconds": 3e-7, "scipy_finite": 0.25,
         "mpmath_seconds": 2e-3, "mpmath_finite": 1.0, "times_scipy": t, "times_scipy_on_all_cores": 2 * t, "times_mpmath": 2e5}
        for t in (30.0, 31.0, 50.0)
    ]  # fmt: skip
    machine = {"cpu": "Example CPU", "threads": 2, "versions": {"dither": "0.1.0"}}
    record = {"machine": machine, "date": "2026-11-28T00:00:00+00:00", "kernels": "avx2", "accuracy": both, "speed": rows}
    (folder / "log_bessel.json").write_text(json.dumps(record))
    row = {"function": "K", "range": "0-150", "points": 10**6, "points_a_second": 2e8, "times_cpu": 3.5, "times_unsorted": None}
    agreement = {"points": 24000, "I": {"maximum": 3e-15}, "K": {"maximum": 2e-15}}
    gpu = {"device": "Example GPU", "cpu_path": "avx2", "cpu_threads": 16, "versions": {"torch": "2"}, "date": "2026-11-28", "agreement": agreement}
    (folder / "log_bessel_gpu.json").write_text(json.dumps(gpu | {"rows": [row, row | {"times_unsorted": 2.25}]}))
    fit = {"dimension": 5120, "samples": 1000, "concentration": 4740.2, "marginal_concentration": 4731.0, "interval_95": [4723.0, 4739.0],
           "log_likelihood_a_sample": 15721.6, "grid_maximum_over_estimate": 1.0, "scipy_concentration": 1e-8,
           "scipy_log_likelihood_a_sample": None}  # fmt: skip
    (folder / "von_mises_fisher.json").write_text(json.dumps({"machine": machine, "date": "2026-11-28", "rows": [fit]}))
    assert call(root, "--check") == 1
    assert call(root, "--special") == 0 and call(root, "--check") == 0
    text = page.read_text()
    assert "| 5,120 | 1,000 | 4,740 | 4,731 | 4,723 .. 4,739 | 15,721.6 | at 1.00 of it | 1e-08 | not finite |" in text
    assert "stale words" not in text and "| log K_v | 1.5e-15 | 7.0e-16 | 4.0e-17 |" in text and "| median | | | | | | | 31.0 | 62.0 |" in text
    assert "| log K, 0-150 | 1,000,000 | 200 | 3.5 | 2.25 |" in text and "Example GPU" in text
    drawing = (root / "docs" / "log_bessel.svg").read_text()
    assert drawing.startswith("<svg") and "#14326e" in drawing  # the darkest cell


def test_the_record_of_exports_becomes_a_table(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        call(root, "--exports")
    page = root / "docs" / "exports.md"
    page.write_text("# made up\n\n<!-- export_perplexity:begin -->\nstale words\n<!-- export_perplexity:end -->\n")
    folder = root / "benchmarks" / "records"
    folder.mkdir(parents=True)
    exports = [
        {"format": "gguf", "bytes": 174_000_000, "reader": "llama.cpp", "perplexity": 20.5, "relative_difference": 0.025, "mean_nats_apart": 5e-2},
        {"format": "onnx", "bytes": 1000, "reader": "onnxruntime", "perplexity": 20.0, "relative_difference": -3e-8, "mean_nats_apart": 4e-6},
        {"format": "awq", "bytes": 1000, "reader": "transformers", "not_run": "ImportError: needs a package"},
        {"format": "gptq", "not_run": "gptq cannot hold it"},
    ]
    rounded = {"perplexities": [20.75, 20.25], "mean_nats_apart": 5e-2, "mean_nats_between_runs": 6e-2}
    about = {"model": "made-up", "method": "rtn", "text": "a text", "windows": 4, "length": 512, "float_perplexity": 18.0, "date": "2026-11-28T00:00"}
    machine = {"cpu": "Example CPU", "threads": 1, "versions": {"xllamacpp": "1"}}
    checkpoint = {"perplexity": 20.0, "rounded_inputs": rounded, "exports": exports}
    (folder / "export_perplexity.json").write_text(json.dumps(about | {"machine": machine, "checkpoints": {"4 bits": checkpoint}}))
    assert call(root, "--check") == 1
    assert call(root, "--exports") == 0 and call(root, "--check") == 0
    text = page.read_text()
    assert "| | gguf | 174 MB | llama.cpp | 20.5000 | +2.50 % | 5.0e-02 |" in text and "| -3e-06 % | 4.0e-06 |" in text
    assert "20.2500 .. 20.7500 | +1.25 % .. +3.75 % | 5.0e-02; 6.0e-02 between runs |" in text and "stale words" not in text
    assert "- 4 bits, awq in transformers: `ImportError: needs a package`" in text and "- 4 bits, gptq: `gptq cannot hold it`" in text
    page.write_text(text.replace("20.5000", "20.0000"))
    assert call(root, "--check") == 1


def test_marks_must_be_there_once() -> None:
    with pytest.raises(ValueError, match="once"):
        readme.with_section("nothing", "text")
    with pytest.raises(ValueError, match="once"):
        readme.with_section(f"{readme.END}{readme.BEGIN}", "text")


def test_these_documents_are_what_the_records_give() -> None:
    if not readme.expected(ROOT, RECORDS):
        pytest.skip("nothing was measured yet: no docs/record.json and no claim records")
    assert readme.main(["--check"]) == 0


def test_speeds_come_from_their_records(root: Path) -> None:
    records = root / "benchmarks" / "records"
    records.mkdir(parents=True)
    where = {"machine": {"cpu": "Example CPU", "versions": {"dither": "0.1.0"}}, "date": "2026-11-24"}
    one = {"name": "dither", "dtype": "bfloat16", "bytes_a_token": 5e7, "tokens_per_second": 300.0, "share_of_bandwidth": 0.5}
    one |= {"prefill_512_tokens_per_second": 1500.0, "times_llama_cpp_q4_0": {"tokens_per_second": 1.5}}
    rows = [one, {"name": "other", "dtype": "", "bytes_a_token": 6e7, "tokens_per_second": 200.0, "share_of_bandwidth": 0.4}]
    decode = {"threads": 2, "tokens": 128, "prompt_tokens": 32, "rounds": 5, "read_bandwidth": 5e10, "rows": rows}
    decode |= {"did_not_run": {"third": "no file"}}
    (records / "decode.json").write_text(json.dumps(decode | where))
    page, marks = root / "docs" / "speed.md", "".join(f"<!-- {name}:begin -->\n<!-- {name}:end -->\n" for name in readme.SPEED)
    page.write_text(marks)
    (root / "README.md").write_text("<!-- decode:begin -->\nstale\n<!-- decode:end -->\n")
    assert call(root, "--speed") == 0
    text = page.read_text()
    assert "| **dither** | bfloat16 | 50.0 | 300.0 | 50 % | 1.50 | 1,500 |" in text and "| other | – | 60.0 | 200.0 | 40 % | – | – |" in text
    assert "third did not run: no file" in text and "<!-- serve:begin -->\n<!-- serve:end -->" in text
    page.write_text(text.replace("300.0", "301.0"))
    assert call(root, "--check") == 1


def test_every_table_of_speeds_has_its_place() -> None:
    page = (ROOT / "docs" / "speed.md").read_text()
    assert all(page.count(f"<!-- {name}:{end} -->") == 1 for name in readme.SPEED for end in ("begin", "end"))
