"""SPRIGHT's claim on small problems: its figures are those that its tests read, and the peers do what they say."""

from __future__ import annotations

import numpy as np
import pytest

from dither.claims import spright
from dither.claims import spright_peers as peers
from dither.special import fwht


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "RUNS": 2, "BITS": 13, "K": 12, "FIXED_K": 8, "LENGTHS": (10, 13, 30), "PEER_BITS": 11, "LASSO_BITS": 8, "LASSO_K": 4, "LONG": 12,
    }.items():  # fmt: skip
        monkeypatch.setattr(spright, name, value)


def test_signals_are_what_they_say() -> None:
    s = peers.signal(12, 20, 10.0, 0)
    x = np.zeros(1 << 12)
    x[s.support] = s.values
    assert set(np.abs(s.values)) == {1.0} and len(np.unique(s.support)) == 20
    assert 10 * np.log10((s.values**2).sum() / s.sigma**2) == pytest.approx(10)
    assert (s.f - fwht(x)).std() == pytest.approx(s.sigma, rel=0.05)
    assert s.exact(s.support[::-1]) and not s.exact(s.support[:-1]) and s.recall(s.support[:15]) == 0.75
    assert s.error(x) == 0 and s.error(0 * x) == pytest.approx(1)
    far = peers.Sampled(50, 20, 10.0, 0)
    exact = peers.Sampled(50, 20, None, 0)
    masks = np.random.default_rng(0).integers(0, 1 << 50, 70000, dtype=np.uint64)
    assert len(np.unique(far.support)) == 20 and (far(masks) - exact(masks)).std() == pytest.approx(far.sigma, rel=0.02)
    assert np.array_equal(exact(masks), exact(masks))


def test_the_full_transform_and_lasso() -> None:
    s = peers.signal(9, 6, 15.0, 1)
    assert s.exact(np.flatnonzero(peers.dense(s)).astype(np.uint64)) and s.error(peers.dense(s)) < 0.01
    found = peers.lasso(s, 300, 0)
    assert s.exact(np.flatnonzero(found).astype(np.uint64)) and s.error(found) < 0.05


def test_a_peer_that_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peers.PACKAGES, "q-sft", "no_such_package")
    assert peers.absent("q-sft") == "q-sft is left out: the package no_such_package is not installed" and peers.absent("dense") == ""
    lines: list[str] = []
    figures = spright.measure(0, lines.append)
    assert lines[0] == peers.absent("q-sft") and not any("q-SFT" in name for name in figures)
    assert all(np.isfinite(value) for value in figures.values())


def test_the_tests_read_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """With constants of the claim's own in the names; a peer that is missing makes its test fail."""
    monkeypatch.setattr(peers, "absent", lambda peer: "missing" if peer == "q-sft" else "")
    figures = spright.recovery(0) | spright.scaling(0) | spright.against(0) | spright.crossover(0)
    renamed = {
        name.replace("K = 8 ", "K = 32 ").replace("n = 11 ", "n = 16 ").replace("n = 8 ", "n = 12 ", 1 if name.startswith("n = 8 ") else 0): value
        for name, value in figures.items()
    }
    renamed |= {name.replace("n = 12 full", "n = 24 full").replace("n = 12 noiseless s", "n = 24 noiseless s"): v for name, v in figures.items()}
    passed = [test.passes(renamed) for test in spright.CLAIM.tests]
    assert len(passed) == len(spright.CLAIM.tests) and not passed[-1]
    assert figures["nso exact"] == figures["so exact"] == 1 and figures["full transform recall"] == 1
    assert figures["so share of samples"] < figures["nso share of samples"]


def test_exponents() -> None:
    assert spright.exponent((10, 20, 40), [3.0, 12.0, 48.0]) == pytest.approx(2)
