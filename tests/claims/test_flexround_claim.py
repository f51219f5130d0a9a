"""FlexRound's claim: its synthetic layers for real (few steps), its language-model arms replaced."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from dither import claims
from dither.claims import flexround
from dither.quant.recipe import as_recipe

torch.set_num_threads(1)


def test_the_synthetic_layers() -> None:
    figures = flexround.synthetic(0, steps=60)
    assert len(figures) == 6 * len(flexround.SETTINGS) and all(math.isfinite(v) for v in figures.values())
    ratios = [v for name, v in figures.items() if not name.endswith("moved 2 or more")]
    assert all(0 < ratio <= 1 for ratio in ratios)  # never worse than nearest, and neither is GPTQ here
    assert figures["per-tensor 4-bit FlexRound"] < figures["per-tensor 4-bit AdaRound"]


def test_the_weight_has_outliers_and_the_inputs_are_correlated() -> None:
    w, h = flexround.layer(1)
    assert w.shape == (48, 64) and float(w.abs().max()) > 6 and torch.equal(h, h.T)
    correlation = h / (h.diagonal()[:, None] * h.diagonal()).sqrt()
    assert float((correlation - torch.eye(64)).abs().mean()) > 0.05


def test_a_seed_gives_all_that_the_tests_read(monkeypatch: pytest.MonkeyPatch) -> None:
    made = flexround.synthetic(0, steps=1)
    recipes: list[Any] = []

    def measured(recipe: Any, seed: int, say: Any, label: str) -> dict[str, float]:
        recipes.append(as_recipe(recipe))
        return {f"{label} perplexity": 30.0 - len(recipes), f"{label} bits": 3.4}

    monkeypatch.setattr(flexround, "synthetic", lambda seed: made)
    monkeypatch.setattr(flexround, "measured", measured)
    monkeypatch.setattr(flexround, "float_perplexity", lambda: 20.0)
    record = claims.run(flexround.CLAIM, seeds=[0], say=lambda line: None)
    assert [r.name for r in recipes] == ["gptq", "flexround"] and recipes[0].weights == recipes[1].weights
    assert recipes[1].rounding.start == "gptq" and recipes[1].rounding.steps == 80
    assert len(record["tests"]) == 6 and record["tests"][-1]["holds"]
