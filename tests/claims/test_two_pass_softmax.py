"""The claim of the two-pass softmax on rows that take no time; what decides its verdict."""

from __future__ import annotations

import math

import pytest

from dither.claims import two_pass_softmax as claim
from dither.special import timing


def test_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "LARGE", 1 << 14)
    monkeypatch.setattr(claim, "SIZES", (1 << 12, 1 << 13))
    monkeypatch.setattr(claim, "ROUNDS", 1)
    said: list[str] = []
    figures = claim.measure(0, said.append)
    isas = [isa for isa in ("avx512", "avx2") if isa in timing.instruction_sets()]
    assert len(said) == 2 * len(isas) + 2 * bool(timing.instruction_sets())
    assert all(math.isfinite(value) for value in figures.values())
    for isa in isas:
        name = f"{isa}, 1 thread: two-pass over"
        assert figures[f"{name} the better three-pass"] == pytest.approx(min(figures[f"{name} recompute"], figures[f"{name} reload"]))
    assert figures["error of two_pass, ulp"] < 8
    for test in claim.CLAIM.tests:
        assert isinstance(test.passes(figures), bool)


def test_the_verdict_needs_what_was_measured() -> None:
    good = {
        **{f"{isa}, {threads}: two-pass over {other}": 1.3 for isa in ("avx512", "avx2") for threads in ("1 thread", "2 threads")
           for other in ("the better three-pass", "torch.softmax")},
        "avx512, 1 thread: bytes a second, fastest algorithm over slowest": 1.1, "auto behind the best of four, at worst": 0.01,
        "error of two_pass, ulp": 3.0, "error of torch, ulp": 60.0,
    }  # fmt: skip
    assert all(test.passes(good) for test in claim.CLAIM.tests)
    worse = {
        "avx512, 1 thread: two-pass over the better three-pass": 1.1,
        "avx2, 1 thread: two-pass over the better three-pass": 1.0,
        "avx2, 2 threads: two-pass over the better three-pass": 0.9,
        "avx512, 2 threads: two-pass over torch.softmax": 0.9,
        "avx512, 1 thread: bytes a second, fastest algorithm over slowest": 1.3,
        "auto behind the best of four, at worst": 0.2,
        "error of two_pass, ulp": 11.0,
        "error of torch, ulp": 2.0,
    }
    for test, (name, value) in zip(claim.CLAIM.tests, worse.items(), strict=True):
        assert not test.passes(good | {name: value}), test.says
    without = {name: value for name, value in good.items() if not name.startswith("avx512")}
    assert not claim.CLAIM.tests[0].passes(without)  # a processor without AVX-512 shows nothing about it
