"""The pieces of the claim on log-Bessel functions."""

from __future__ import annotations

import math

import pytest
import torch

from dither.claims import log_bessel
from dither.claims.bessel_oracle import exact, mixed_error, relative_error
from dither.special import log_iv


def test_exact_values_have_closed_forms() -> None:
    """I_{1/2} = sqrt(2 / (pi x)) sinh x, K_{1/2} = sqrt(pi / (2 x)) e^-x, and their neighbours."""
    log, ratio = exact("I", 0.5, 2.0)
    assert mixed_error(0.5 * math.log(1 / math.pi) + math.log(math.sinh(2.0)), log) < 5e-16
    assert relative_error(1 / math.tanh(2.0) - 0.5, ratio) < 5e-16
    log, ratio = exact("K", 0.5, 2.0)
    assert mixed_error(0.5 * math.log(math.pi / 4) - 2, log) < 5e-16 and relative_error(1.0, ratio) < 1e-20
    assert mixed_error(float(log.mid()) + 1e-9, log) == pytest.approx(1e-9 / abs(float(log.mid())), rel=1e-5)


@pytest.mark.parametrize("name", list(log_bessel.RANGES))
def test_draws_lie_in_their_range(name: str) -> None:
    for values, (low, high) in zip(log_bessel.draw(name, 2000, 0), log_bessel.RANGES[name], strict=True):
        assert low <= float(values.min()) and float(values.max()) <= high and values.dtype == torch.float64
        middle = math.sqrt(low * high) if name == "log-uniform" else (low + high) / 2
        assert 900 < int((values < middle).sum()) < 1100
    assert not torch.equal(log_bessel.draw(name, 9, 0)[0], log_bessel.draw(name, 9, 1)[0])


def test_errors_are_seen() -> None:
    v, x = log_bessel.draw("small", 20, 0)
    values = log_iv(v, x)
    assert float(log_bessel.errors("I", v, x, values).max()) < 1e-14
    wrong = log_bessel.errors("I", v, x, values + 1e-6 * values.abs().clamp_min(1))
    assert bool(((wrong - 1e-6).abs() < 1e-11).all())


def test_scipys_way_agrees_where_it_works_and_fails_elsewhere() -> None:
    v, x = log_bessel.draw("small", 50, 0)
    for kind, function in log_bessel.FUNCTIONS.items():
        found = torch.from_numpy(log_bessel.scipy_logs(kind, v.numpy(), x.numpy()))
        torch.testing.assert_close(found, function(v, x), rtol=1e-11, atol=1e-11)
    v, x = log_bessel.draw("150-1e4", 200, 0)
    assert 0.1 < float(torch.from_numpy(log_bessel.scipy_logs("I", v.numpy(), x.numpy())).isfinite().double().mean()) < 0.5


def test_a_figure_that_is_missing_or_not_finite_fails() -> None:
    passes = log_bessel._all
    assert passes({"error a": 1.0, "error b": 2.0}, "error", lambda e: e < 3)
    assert not passes({"error a": 1.0, "error b": 4.0}, "error", lambda e: e < 3)
    assert passes({"error a": 1.0, "error b": 4.0}, "error", lambda e: e < 3, but="b")
    assert not passes({"other": 1.0}, "error", lambda e: e < 3) and not passes({"error": math.nan}, "error", lambda e: True)
