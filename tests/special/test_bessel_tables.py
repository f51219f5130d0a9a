"""The constants of the Bessel kernels against mpmath."""

from __future__ import annotations

import mpmath
import pytest

from dither.special.bessel_tables import bessel_tables, reciprocal_gamma, zeta


@pytest.fixture(autouse=True)
def digits() -> object:
    with mpmath.workdps(40):
        yield


def test_reciprocal_gamma() -> None:
    found = reciprocal_gamma(24)
    assert found[:3] == [1, float(mpmath.euler), float((6 * mpmath.euler**2 - mpmath.pi**2) / 12)]
    for a in (-0.5, -0.3, 0.1, 0.5):
        value = mpmath.polyval([mpmath.mpf(c) for c in reversed(found)], mpmath.mpf(a))
        assert abs(value - mpmath.rgamma(1 + mpmath.mpf(a))) < 2e-17


@pytest.mark.parametrize("n", [2, 3, 10, 24])
def test_zeta(n: int) -> None:
    assert abs(mpmath.mpf(str(zeta(n))) - mpmath.zeta(n)) < mpmath.mpf(10) ** -25


def test_logarithms() -> None:
    logs = bessel_tables().logs.tolist()
    for i in (*range(24, 49), 64):
        c, high, low = (column[i % 32 if i < 64 else 32] for column in logs)
        assert abs(mpmath.mpf(high) + low + mpmath.log(c)) < mpmath.mpf(2) ** -90
        assert (high * 2**42).is_integer() and (c * 1024).is_integer()
        assert abs(c * i / 32 - 1) < 1e-3  # 1 / m to ten bits, or 1/2 at the end
    assert [column[0] for column in logs] == [1, 0, 0]


def test_nodes() -> None:
    for j, (t, height) in enumerate(bessel_tables().nodes.tolist()):
        assert t == j / 8
        assert abs(height - (mpmath.cosh(t) - 1)) <= height * 2.3e-16
