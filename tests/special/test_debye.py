"""Debye's polynomials against the printed ones and against the equation that they come from."""

from __future__ import annotations

from fractions import Fraction as F

import pytest
import torch

from dither.special.debye import Polynomial, debye_table, debye_u, debye_v, debye_w


def test_the_first_polynomials() -> None:
    """DLMF 10.41.10 and 10.41.11."""
    assert debye_u(0) == debye_v(0) == (1,)
    assert debye_u(1) == (F(1, 8), F(-5, 24))
    assert debye_u(2) == (F(81, 1152), F(-462, 1152), F(385, 1152))
    assert debye_u(3) == (F(30375, 414720), F(-369603, 414720), F(765765, 414720), F(-425425, 414720))
    assert debye_v(1) == (F(-3, 8), F(7, 24))
    assert debye_v(2) == (F(-135, 1152), F(594, 1152), F(-455, 1152))
    assert debye_v(3) == (F(-42525, 414720), F(451737, 414720), F(-883575, 414720), F(475475, 414720))
    assert debye_w(1) == (F(-1, 2),)


def power_series(polynomial: Polynomial, k: int) -> dict[int, F]:
    return {k + 2 * j: c for j, c in enumerate(polynomial)}


@pytest.mark.parametrize("k", range(20))
def test_the_recurrences(k: int) -> None:
    """u_{k+1}' is the derivative of t^2 (1 - t^2) u_k' / 2, plus (1 - 5 t^2) u_k / 8; v = u + (1 - t^2) w."""
    u = power_series(debye_u(k), k)
    following = power_series(debye_u(k + 1), k + 1)
    derivative: dict[int, F] = {}

    def add(power: int, value: F) -> None:
        derivative[power] = derivative.get(power, F(0)) + value

    for n, c in u.items():  # d/dt of t^2 (1 - t^2) n t^(n-1) / 2 is ((n + 1) t^n - (n + 3) t^(n+2)) n / 2
        add(n, c * n * (n + 1) / 2 + c / 8)
        add(n + 2, -c * n * (n + 3) / 2 - 5 * c / 8)
    assert {n - 1: c * n for n, c in following.items()} == {n: c for n, c in derivative.items() if c}
    v, w = power_series(debye_v(k + 1), k + 1), power_series(debye_w(k + 1), k + 1)
    for n in v:
        assert v[n] == following[n] + w.get(n, F(0)) - w.get(n - 2, F(0))


def test_the_table_is_rounded_once() -> None:
    u, w = debye_table(20)
    assert u.shape == w.shape == (20, 21) and u.dtype == torch.float64
    assert u[19, :21].tolist() == [float(c) for c in debye_u(20)] and w[19, :20].tolist() == [float(c) for c in debye_w(20)]
    assert not u[3, 5:].any() and not w[3, 4:].any()
    assert torch.allclose(u.sum(1)[:3], torch.tensor([-1 / 12, 1 / 288, 139 / 51840], dtype=torch.float64))  # Stirling's series at t = 1


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"^k: "):
        debye_u(-1)
    with pytest.raises(ValueError, match=r"^k: "):
        debye_w(0)
