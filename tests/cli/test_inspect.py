"""``dither inspect`` on a tiny model: table, page and JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import tiny_folder
from dither.cli.main import main
from dither.report import InspectRecord


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("inspect")
    tiny_folder.save(place / "model")
    (place / "text.txt").write_text(tiny_folder.text())
    return place


def call(place: Path, *arguments: object) -> int:
    given = ["inspect", place / "model", "--calibration", place / "text.txt", "--samples", 2, "--length", 16, *arguments]
    with pytest.raises(SystemExit) as done:
        main(list(map(str, given)))
    assert isinstance(done.value.code, int)
    return done.value.code


def test_json_and_page(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(place, "--group", "16", "--html", place / "page.html", "--json") == 0
    captured = capsys.readouterr()
    last = captured.out.strip().splitlines()[-1]
    assert json.loads(last, parse_constant=pytest.fail)["kind"] == "inspect"
    record = InspectRecord.model_validate_json(last)
    assert len(record.layers) == 14 and record.widths == [4, 3, 2] and record.scheme.endswith("group 16")
    assert any(layer.sites for layer in record.layers)
    assert "[2/2]" in captured.err and "bits" not in captured.err
    page = (place / "page.html").read_text()
    assert "<svg" in page and "mlp.down_proj" in page


def test_table(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(place, "--group", "row") == 0
    printed = capsys.readouterr().out
    assert "self_attn" in printed and "one scale a row" in printed.replace("\n", " ")


def test_wrong_group(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(place, "--group", "none") == 2
    assert "--group none" in capsys.readouterr().err
