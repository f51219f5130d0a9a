"""The figures in docs/special.md and its plots are those of the stored records."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("spright_figures", ROOT / "benchmarks" / "spright_figures.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


figures = _load()


def test_this_document_is_what_the_records_give() -> None:
    assert figures.main(["--check"]) == 0


def test_a_figure_typed_by_hand_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / figures.PAGE, tmp_path / figures.PAGE)
    records = tmp_path / "records"
    records.mkdir()
    assert figures.main([], tmp_path, records) == 0  # no records: nothing to put in
    assert (tmp_path / figures.PAGE).read_text() == (ROOT / figures.PAGE).read_text()
    record = json.loads((figures.RECORDS / "spright.json").read_text())
    record["noise"][0]["recall"] = 0.123
    (records / "spright.json").write_text(json.dumps(record))
    assert figures.main(["--check"], tmp_path, records) == 1 and "special.md: is not" in capsys.readouterr().err
    assert figures.main([], tmp_path, records) == 0 and figures.main(["--check"], tmp_path, records) == 0
    page = tmp_path / figures.PAGE
    assert "| 0.123 |" in page.read_text() and (tmp_path / "docs" / "spright_time.svg").read_text().startswith("<svg")
    page.write_text(page.read_text().replace("0.123", "0.999"))
    assert figures.main(["--check"], tmp_path, records) == 1


def test_marks_must_be_there_once() -> None:
    with pytest.raises(ValueError, match="once"):
        figures.placed("nothing", "fwht", "text")
