"""OSTQuant's claim: every arm end to end on a tiny model, and all figures that its tests read."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_folder
from dither.claims import ostquant
from dither.quant.recipes import OSTQuant

torch.set_num_threads(1)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_folder.save(tmp_path / "model")
    (tmp_path / "text").write_text(tiny_folder.text())
    for knob, value in {"MODEL": str(tmp_path / "model"), "SAMPLES": 8, "TOKENS": 24, "LENGTH": 32, "WINDOWS": 2, "SECOND_LENGTH": 32}.items():
        monkeypatch.setattr(ostquant, knob, value)
    monkeypatch.setattr(ostquant, "texts", lambda: (tmp_path / "text", tiny_folder.text(seed=1), "tiny"))
    monkeypatch.setattr(ostquant, "float_perplexity", lambda: 90.0)
    small: dict[str, Any] = {k: replace(m, k_top=50, steps=2) if isinstance(m, OSTQuant) else m for k, m in ostquant.ARMS.items()}
    monkeypatch.setattr(ostquant, "ARMS", small)
    ostquant.second_text.cache_clear()


def test_a_seed_gives_all_that_the_tests_read(tiny: None) -> None:
    figures = ostquant.measure(0, lambda line: None)
    ostquant.second_text.cache_clear()
    assert all(isinstance(v, float) and math.isfinite(v) for v in figures.values())
    assert all(0 <= figures[f"{arm} KL"] < 1 for arm in ostquant.ARMS)
    for test in ostquant.CLAIM.tests:
        assert test.passes(figures) in (True, False)


def test_the_divergence_of_the_float_model_is_none(tiny: None) -> None:
    model, _ = ostquant.open_model(ostquant.MODEL)
    assert ostquant.divergence(model) < 1e-4
    ostquant.second_text.cache_clear()


def test_arms_differ_in_one_thing_each() -> None:
    arms: dict[str, Any] = ostquant.ARMS
    assert replace(arms["OSTQuant"], learn=("R_res", "R_ov")) == arms["R, KL-Top"]
    assert replace(arms["R, KL-Top"], loss="cross_entropy") == arms["R, cross-entropy"]
    assert replace(arms["R, cross-entropy"], init="hadamard") == arms["SpinQuant"]
    assert {(m.bits, m.act_bits, m.kv_bits, m.group, m.sym) for m in arms.values()} == {(4, 4, 4, None, True)}
