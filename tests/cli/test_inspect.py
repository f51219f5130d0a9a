"""``dither inspect`` on a tiny model: table, page and JSON."""

from __future__ import annotations

import html
import json
import re
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
    """Under its columns, each layer's figures as the record has them: shape, outliers, tails, the error at each width, and its proved sites."""
    assert call(place, "--group", "row", "--json") == 0
    record = InspectRecord.model_validate_json(capsys.readouterr().out.strip().splitlines()[-1])
    assert call(place, "--group", "row") == 0
    printed = capsys.readouterr().out
    assert "one scale a row" in printed and "text.txt, 2 windows of 16 tokens" in printed
    lines = [re.split(r"\s{2,}", line.strip()) for line in printed.splitlines()]
    assert ["layer", "shape", "max/median", "kurt. in", "kurt. W", "4 bits", "3 bits", "2 bits", "sites"] in lines
    rows = {line[0]: line[1:] for line in lines if line[0].startswith("model.layers.")}
    assert list(rows) == [layer.name for layer in record.layers] and len(rows) == 14
    for layer in record.layers:
        shape, *figures, sites = rows[layer.name]
        known = (layer.input_max_over_median, layer.input_kurtosis, layer.weight_kurtosis, *(layer.rtn_error[b] for b in (4, 3, 2)))
        assert shape == "x".join(map(str, layer.shape)) and [float(f) for f in figures] == pytest.approx(known, rel=5e-3)
        assert layer.sites and sites == ", ".join(layer.sites)
    assert "input_layernorm -> self_attn.q_proj, self_attn.k_proj, self_attn.v_proj" in rows["model.layers.0.self_attn.k_proj"][-1]


def test_page(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Plots of the three statistics, in which every layer has a mark, and a table of all layers."""
    assert call(place, "--group", "16", "--html", place / "plots.html") == 0
    assert f"{place / 'plots.html'}: the page" in capsys.readouterr().out
    page = (place / "plots.html").read_text()
    pictures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    for title in ("largest input channel over the median channel", "kurtosis of the inputs", "kurtosis of the weights"):
        own = [p for p in pictures if f": {title}</title>" in p]
        assert own and all("<path" in p and "block 0" in p and "block 1" in p for p in own), title
    told = html.unescape(re.sub(r"<[^>]*>", " ", page))
    for words in ("self_attn.o_proj", "mlp.down_proj", "error at 2 bits", "max / median in", "kurtosis W", "scale: mlp.up_proj -> mlp.down_proj"):
        assert words in told


def test_wrong_group(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(place, "--group", "none") == 2
    assert "--group none" in capsys.readouterr().err
