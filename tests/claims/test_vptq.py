"""The pieces of VPTQ's claim on small matrices and a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny_folder
from dither.claims import vptq
from dither.formats import Codebook
from dither.quant.rounding.columns import damped_inverse_factor
from dither.quant.rounding.vector_columns import vector_columns
from dither.quant.statistics import HESSIAN, Statistics


def inputs(columns: int = 40) -> Statistics:
    g = torch.Generator().manual_seed(0)
    statistics = Statistics(columns, frozenset({HESSIAN}))
    statistics.update(torch.randn(256, columns, generator=g) @ torch.randn(columns, columns, generator=g))
    return statistics


def test_vectors_of_one_input_are_the_same_either_way() -> None:
    weight, h = torch.randn(32, 40, generator=torch.Generator().manual_seed(1)), inputs().hessian
    along_outputs = vector_columns(weight, h, Codebook(1, 8)).dequantize()
    found = vptq.along_inputs(weight, h, Codebook(1, 8))
    power = [float(((w - weight).double() @ h * (w - weight).double()).sum()) for w in (found, along_outputs)]
    assert power[0] == pytest.approx(power[1], rel=0.1)  # k-means starts elsewhere, since its vectors come in another order


def test_along_inputs_chooses_the_least_error_that_is_left() -> None:
    """The centroid of a vector is the one whose error, best compensated by the inputs that follow, costs least: the Schur complement of H."""
    weight, h = torch.randn(1, 8, generator=torch.Generator().manual_seed(1)), inputs(8).hessian
    found = vptq.along_inputs(weight, h, Codebook(4, 2), iterations=3)
    order = h.diagonal().argsort(descending=True)
    damped = (h + 0.01 * h.diagonal().mean() * torch.eye(8))[order[:, None], order]
    first = damped[:4, :4] - damped[:4, 4:] @ torch.linalg.inv(damped[4:, 4:]) @ damped[4:, :4]
    inverse = torch.linalg.inv(damped_inverse_factor(h, 0.01, order)[0][:4, :4])
    assert float((inverse @ inverse.T - first).abs().max()) < 1e-9 * float(first.abs().max())
    assert found.shape == (1, 8)
    with pytest.raises(ValueError, match="do not divide"):
        vptq.along_inputs(weight, h, Codebook(3, 2))


def test_every_arm_sees_the_same_hessian() -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    facts = vptq.SideBySide(kmeans_iters=3).round(weight, vptq.TWO, {}, inputs(64)).facts
    arms = {"VPTQ 2", "VPTQ 3", "RTN 2", "RTN 3", "GPTQ 2", "GPTQ 3", "plain VQ", "H-weighted VQ", "along inputs"}
    assert facts.keys() == arms and all(0 <= value < 2 for value in facts.values())
    assert facts["GPTQ 2"] < facts["RTN 2"]


def test_layer_errors_by_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_folder.save(tmp_path / "model")
    (tmp_path / "text.txt").write_text(tiny_folder.text())
    monkeypatch.setattr(vptq, "MODEL", str(tmp_path / "model"))
    monkeypatch.setattr(vptq, "texts", lambda: (tmp_path / "text.txt", "", ""))
    monkeypatch.setattr(vptq, "BLOCKS", (1,))
    monkeypatch.setattr(vptq, "TOKENS", 32)
    lines: list[str] = []
    figures = vptq.layer_errors(0, lines.append)
    kinds = {name.rpartition(", ")[2] for name in figures if ", " in name}
    assert len(kinds) == 7 and len(lines) == 1
    means = [figures[f"VPTQ 2 layer error, {kind}"] for kind in kinds]
    assert figures["VPTQ 2 layer error"] == pytest.approx(sum(means) / 7)
    assert 0 <= figures["layers out of order"] <= 7


def test_the_tests_read_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = {f"{arm} layer error": 0.1 for arm in ("VPTQ 2", "GPTQ 2", "H-weighted VQ")}
    monkeypatch.setattr(vptq, "layer_errors", lambda seed, say: errors | {"layers out of order": 0.0, "layers where inputs win": 1.0})
    monkeypatch.setattr(vptq, "float_perplexity", lambda: 18.0)
    monkeypatch.setattr(vptq, "measured", lambda recipe, seed, say, label: {f"{label} perplexity": 40.0 if "VPTQ" in label else 60.0})
    figures = vptq.measure(0, print)
    assert [test.passes(figures) for test in vptq.CLAIM.tests] == [True, False, False, False, True, True]
