"""The claims' own measurements: the synthetic experiment for real, the language-model arms with the model replaced."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from dither import claims
from dither.claims import awq, gptq, work


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    work.texts.cache_clear()
    work.float_perplexity.cache_clear()
    monkeypatch.setattr(work, "_seedless", {})


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_awqs_motivating_experiment(seed: int) -> None:
    figures = awq.synthetic(seed)
    assert figures["synthetic scale"] <= 0.5
    assert figures["synthetic 1% by activation"] <= 0.3
    assert figures["synthetic 1% by weight"] >= 0.95 and figures["synthetic 1% at random"] >= 0.95


def test_the_work_is_wikitext_where_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text").mkdir()
    for part in ("valid", "test"):
        (tmp_path / "text" / f"wiki.{part}.tokens").write_text(f"the {part} text")
    monkeypatch.setenv("DITHER_DATA", str(tmp_path))
    calibration, text, what = work.texts()
    assert calibration == tmp_path / "text" / "wiki.valid.tokens" and text == "the test text"
    assert work.data() == what and "WikiText-2" in what


@pytest.mark.parametrize("data", [None, "/nonexistent"])
def test_else_the_embedded_text(data: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DITHER_DATA", raising=False)
    if data:
        monkeypatch.setenv("DITHER_DATA", data)
    calibration, text, what = work.texts()
    assert calibration is None and len(text) > 100_000 and what.startswith("the embedded text (DITHER_DATA ")


class Models:
    """Stands in for the model: counts what is asked for, and makes perplexities up by method, bits and seed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.floats, self.quantized = 0, []
        monkeypatch.setattr(work, "open_model", self.open)
        monkeypatch.setattr(work, "perplexity", self.perplexity)
        monkeypatch.setattr(work, "quantize", self.quantize)

    def open(self, name: str) -> tuple[Any, None]:
        self.floats += name == work.MODEL
        return name, None

    def perplexity(self, model: str, *given: Any, windows: int, length: int) -> Any:
        assert (windows, length) == (4, 2048)
        value = 20.0 if model == work.MODEL else 20.0 + float(model)
        return type("P", (), {"perplexity": value})

    def quantize(self, model: str, recipe: Any, calibration: Any, out: Path, **given: Any) -> Any:
        from dither.quant.recipe import as_recipe

        assert (given["samples"], given["length"]) == (16, 512)
        plan = as_recipe(recipe)
        self.quantized.append((plan.name, given["seed"]))
        scheme = plan.weights.format.bits
        worse = {"rtn": 9.0, "gptq": 3.0, "awq": 4.0}[plan.name] * 4 ** (3 - scheme)
        row = type("R", (), {"output_error": worse / 100})
        report = type("Report", (), {"layers": [row, row]})
        return type("Q", (), {"report": report, "out": str(worse + given["seed"] / 10), "bits_per_weight": scheme + 0.3})


@pytest.mark.parametrize("name", ["awq", "gptq"])
def test_a_claim_runs_every_arm_and_gives_what_its_tests_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = Models(monkeypatch)
    record = claims.run(claims.CLAIMS[name], say=lambda line: None)
    assert stand_in.floats == 1  # not once a seed
    assert "16 x 512" in record["work"] and record["data"] == work.data()
    assert record["seeds"] == [0, 1, 2] and len(record["tests"]) >= 4
    assert all(math.isfinite(figure["mean"]) for figure in record["figures"].values())
    closed = record["tests"][0]
    assert closed["holds"] and "log-perplexity gap" in closed["says"]


def test_methods_without_data_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = Models(monkeypatch)
    claims.run(awq.CLAIM, say=lambda line: None)
    runs = [name for name, _ in stand_in.quantized]
    assert runs.count("rtn") == 2 and runs.count("awq") == 3 * 4 and runs.count("gptq") == 3


def test_watched_grids_are_those_of_rtn() -> None:
    from dither.formats import Int, group

    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    scheme = Int(3) @ group(16)
    watched, plain = gptq.Watched().fit(weight, scheme, None), scheme.fit(weight)
    assert watched.keys() == plain.keys() and all(torch.equal(watched[k], plain[k]) for k in plain)


def test_gap_closed() -> None:
    figures = {"float perplexity": 10.0, "a perplexity": 20.0, "b perplexity": math.sqrt(200.0)}
    assert work.gap_closed(figures, "b", "a") == pytest.approx(0.5)
    assert work.gap_closed(figures, "a", "a") == 0
    worse = figures | {"b perplexity": 40.0}
    assert work.gap_closed(worse, "b", "a") == pytest.approx(-1.0)
