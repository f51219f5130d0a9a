"""log I_v and log K_v as users call them: closed forms and identities, derivatives, types and shapes, wrong calls, the paper's own expressions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dither.claims.bessel_oracle import exact, mixed_error, relative_error
from dither.special import bessel_ratio, log_iv, log_kv
from dither.special.bessel_regions import regions_of
from dither.special.bessel_slopes import ratio_slope

X = torch.logspace(-8, 8, 400, dtype=torch.float64)


def close(a: Any, b: Any, tolerance: float = 4e-15) -> bool:
    """Within ``tolerance`` of max(1, |b|)."""
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    return bool(((a - b).abs() <= tolerance * b.abs().clamp_min(1)).all())


def test_half_integers_have_closed_forms() -> None:
    """I_{1/2} = sqrt(2 / (pi x)) sinh x; K_{1/2} = sqrt(pi / (2x)) e^-x; K_{3/2} = K_{1/2} (1 + 1/x)."""
    log_sinh = X + torch.log(-torch.expm1(-2 * X)) - math.log(2)
    assert close(log_iv(0.5, X), 0.5 * torch.log(2 / (math.pi * X)) + log_sinh)
    k = 0.5 * torch.log(math.pi / (2 * X)) - X
    assert close(log_kv(0.5, X), k)
    assert close(log_kv(1.5, X), k + torch.log1p(1 / X))
    assert torch.allclose(bessel_ratio(0.5, X), 1 / torch.tanh(X) - 1 / X, rtol=1e-14, atol=1e-8)


@pytest.mark.parametrize("v", [0.0, 0.3, 1.0, 5.5, 12.65, 13.0, 40.0, 200.0])
def test_wronskian(v: float) -> None:
    """I_v K_{v+1} + I_{v+1} K_v = 1 / x."""
    both = torch.logaddexp(log_iv(v, X) + log_kv(v + 1, X), log_iv(v + 1, X) + log_kv(v, X))
    size = torch.maximum(log_iv(v, X).abs(), log_kv(v + 1, X).abs()).clamp_min(1)
    assert bool(((both + torch.log(X)).abs() < 1e-14 * size).all())


@pytest.mark.parametrize("v", [0.0, 0.25, 3.0, 1000.0])
def test_small_arguments(v: float) -> None:
    """I_v -> (x/2)^v / Gamma(v + 1), K_v -> Gamma(v) (2/x)^v / 2, down to the smallest number."""
    x = torch.tensor([5e-324, 1e-310, 1e-200, 1e-20], dtype=torch.float64)
    assert close(log_iv(v, x), v * (torch.log(x) - math.log(2)) - math.lgamma(v + 1))
    if v > 0.2:
        assert close(log_kv(v, x), math.lgamma(v) - math.log(2) - v * (torch.log(x) - math.log(2)), 3e-10)
    else:
        assert close(log_kv(v, x), torch.log(math.log(2) - torch.log(x) - 0.57721566490153286))


def test_nothing_overflows_in_the_domain() -> None:
    v = torch.cat([torch.zeros(1), torch.logspace(-12, 6, 60)]).double()[:, None]
    x = torch.logspace(-300, 8, 200, dtype=torch.float64)
    for f in (log_iv, log_kv, bessel_ratio):
        assert bool(f(v, x).isfinite().all())
    ratio = bessel_ratio(v, x)
    assert bool((ratio > 0).all()) and bool((ratio <= 1).all())


def test_where_log_i_crosses_zero() -> None:
    """Nothing is left of two numbers of size v, and the error is still that of 1."""
    for v in (5.0, 77.0, 1e3, 1e6):
        low, high = 0.3 * v, v
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (middle, high) if log_iv(v, middle) < 0 else (low, middle)
        assert mixed_error(float(log_iv(v, low)), exact("I", v, low)[0]) < 5e-15


def test_relative_digits_where_i_0_is_next_to_1() -> None:
    for v, x in ((0.0, 1e-6), (0.0, 1e-3), (1e-9, 1e-4), (0.0, 0.7)):
        assert relative_error(float(log_iv(v, x)), exact("I", v, x)[0]) < 1e-15


# -- derivatives -----------------------------------------------------------------------------------------------------------------

ORDERS = torch.tensor([0.0, 0.3, 0.5, 2, 7.5, 12, 14, 20, 40, 100, 300, 3, 0.2, 1000, 5.0], dtype=torch.float64)
ARGUMENTS = torch.tensor([1.5, 0.4, 5, 25, 11, 0.2, 30, 20, 90, 3, 100, 2000, 400, 1e5, 60], dtype=torch.float64)


@pytest.mark.parametrize("f", [log_iv, log_kv, bessel_ratio])
def test_gradients(f: Any) -> None:
    """Against finite differences in log x, so that one step suits all; once and twice."""
    s = ARGUMENTS.log().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: f(ORDERS, s.exp()), (s,), atol=1e-4, rtol=1e-6)
    assert torch.autograd.gradgradcheck(lambda s: f(ORDERS, s.exp()), (s,), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("kind", "f"), [("I", log_iv), ("K", log_kv)])
def test_gradients_to_full_precision(kind: str, f: Any) -> None:
    """(log I)' = v/x + I_{v+1} / I_v and (log K)' = -(v/x + K_{v-1} / K_v), from arb."""
    x = ARGUMENTS.clone().requires_grad_()
    f(ORDERS, x).sum().backward()
    for v, a, found in zip(ORDERS.tolist(), ARGUMENTS.tolist(), x.grad.tolist(), strict=True):
        slope = exact(kind, v, a)[1] + v / a
        assert relative_error(found if kind == "I" else -found, slope) < 5e-15, (v, a)


def test_gradient_of_a_half_integer() -> None:
    """d log K_{1/2} / dx = -1 - 1 / (2x), and the next two derivatives."""
    x = torch.logspace(-6, 8, 200, dtype=torch.float64).requires_grad_()
    (first,) = torch.autograd.grad(log_kv(0.5, x).sum(), x, create_graph=True)
    torch.testing.assert_close(first, -1 - 0.5 / x, rtol=1e-15, atol=0)
    (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
    torch.testing.assert_close(second, 0.5 / x**2, rtol=1e-10, atol=0)
    (third,) = torch.autograd.grad(second[:100].sum(), x)  # up to x = 10: beyond, the Riccati equation cancels
    torch.testing.assert_close(third[:100], -1 / x[:100] ** 3, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(("v", "x"), [(100.0, 1e8), (1e6, 1e8), (0.3, 1e7), (50.0, 60.0), (13.5, 0.01), (1e3, 1e4)])
def test_slope_of_the_ratio_does_not_cancel(v: float, x: float) -> None:
    """A' = 1 - A^2 - (2v+1) A / x, of which up to sixteen digits are lost in floats, from arb."""
    a = exact("I", v, x)[1]
    b = exact("K", v, x)[1]
    slopes = {"I": 1 - a * a - (2 * v + 1) * a / x, "K": b * b + (2 * v - 1) * b / x - 1}
    pair = torch.tensor([v], dtype=torch.float64), torch.tensor([x], dtype=torch.float64)
    for kind, ratio in (("I", a), ("K", b)):
        found = ratio_slope(kind, *pair, torch.tensor([float(ratio.mid())], dtype=torch.float64))
        assert relative_error(float(found), slopes[kind]) < 1e-8 if slopes[kind].rel_accuracy_bits() > 40 else found.isfinite().all()


def test_gradient_at_zero() -> None:
    x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    log_iv(torch.tensor([0.0, 2.0]), x).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0.0, math.inf]


def test_the_order_has_no_derivative() -> None:
    with pytest.raises(NotImplementedError, match="v: requires grad"):
        log_iv(torch.ones(1, requires_grad=True), 1.0)


# -- types and shapes ------------------------------------------------------------------------------------------------------------


def test_types() -> None:
    assert isinstance(log_iv(1, 2.0), np.float64) and log_iv(1, 2) == log_iv(1.0, 2.0)
    assert isinstance(log_kv(1, [1.0, 2.0]), np.ndarray)
    v32, x64 = np.ones(3, np.float32), np.ones(3)
    assert log_iv(v32, v32).dtype == np.float32 and log_iv(v32, x64).dtype == np.float64 and log_iv(0.5, v32).dtype == np.float32
    assert log_iv(np.arange(3), 1.0).dtype == np.float64 and log_iv(np.arange(3), v32).dtype == np.float64
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.tensor([0.5, 3.0, 90.0]).to(dtype)
        y = log_iv(2.5, x)
        assert y.dtype == dtype and torch.equal(y, log_iv(2.5, x.double()).to(dtype))
    assert log_iv(torch.tensor(1), 2.0).dtype == torch.float64
    assert np.asarray(log_iv(np.array([1.0, 2.0], dtype=">f8"), 1.0))[0] == log_iv(1.0, 1.0)


def test_float32_keeps_its_gradient() -> None:
    x = torch.tensor([0.5, 60.0], requires_grad=True)
    log_iv(1.0, x).sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
    torch.testing.assert_close(x.grad, (1 / x + bessel_ratio(1.0, x)).detach())


def test_broadcasting() -> None:
    v, x = torch.rand(3, 1, dtype=torch.float64), torch.rand(4, dtype=torch.float64, requires_grad=True)
    y = log_kv(v, x)
    assert y.shape == (3, 4) and torch.equal(y[1, 2], log_kv(v[1, 0], x[2]))
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == (4,)
    assert log_iv(np.zeros((0, 3)), np.ones(3)).shape == (0, 3) and log_iv(torch.zeros(2, 0), 1.0).shape == (2, 0)
    assert torch.equal(log_iv(v.expand(3, 8)[:, ::2], 1.0), log_iv(v, torch.ones(4)))


def test_wrong_calls() -> None:
    for f in (log_iv, log_kv, bessel_ratio):
        for name, v, x in [
            ("v", -0.5, 1.0), ("x", 1.0, -2.0), ("x", 1.0, torch.tensor([1.0, -3.0])), ("v", np.array([1, -1]), 1.0), ("v", 1j, 1.0), ("x", 1.0, "a"),
            ("x", 1.0, True), ("x", 1.0, torch.tensor([True])), ("v", torch.tensor([1j]), 1.0), ("x", [1.0, 2.0], [1.0, 2.0, 3.0]),
            ("v", np.ones(2, np.longdouble), 1.0),
        ]:  # fmt: skip
            with pytest.raises(ValueError, match=f"^{name}: "):
                f(v, x)
    with pytest.raises(ValueError, match=r"^table: "):
        log_iv(1.0, 1.0, table="loose")
    with pytest.raises(ValueError, match=r"^fallback: "):
        log_kv(1.0, 1.0, fallback="simpson")
    with pytest.raises(ValueError, match="holds -3"):
        log_iv(1.0, torch.tensor([1.0, -3.0, -4.0]))


def test_without_validation_negative_values_give_nan() -> None:
    found = log_iv(np.array([-1.0, 1.0, 1.0]), np.array([1.0, -1.0, 1.0]), validate=False)
    assert np.isnan(found).tolist() == [True, True, False]
    assert np.isnan(log_iv(np.nan, 1.0)) and np.isnan(log_kv(1.0, np.nan))


# -- the paper's own expressions -------------------------------------------------------------------------------------------------


def draws(n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    v, x = torch.rand(2, n, generator=generator, dtype=torch.float64)
    return v * 40, x * 60


def test_the_papers_table() -> None:
    """Finite everywhere, and the median error of every expression is that of the machine."""
    v, x = draws(300)
    regions = regions_of(v, x, "paper")
    for kind, f in (("I", log_iv), ("K", log_kv)):
        values = f(v, x, table="paper")
        errors = torch.tensor([mixed_error(a, exact(kind, b, c)[0]) for a, b, c in zip(values.tolist(), v.tolist(), x.tolist(), strict=True)])
        for code in regions.unique().tolist():
            assert float(errors[regions == code].median()) <= 3e-16
        assert float(errors.max()) > 4e-15  # what the tight table mends
        assert close(f(v, x), values, 1e-12)


def test_rothwells_integral() -> None:
    """Nine digits below v = 1/2, twelve above; other pairs do not use it."""
    v, x = torch.tensor([0.1, 0.4, 0.9, 3.0, 12.0, 50.0]).double(), torch.tensor([1.0, 2.0, 0.5, 7.0, 15.0, 3.0]).double()
    error = (log_kv(v, x, fallback="rothwell") - log_kv(v, x)).abs()
    assert bool((error[:2] < 1e-9).all()) and bool((error[2:] < 1e-10).all()) and float(error[5]) == 0
    assert float(error[0]) > 1e-12
    assert torch.equal(log_kv(2.0, torch.tensor([0.0, math.inf]).double(), fallback="rothwell"), torch.tensor([math.inf, -math.inf]).double())


def test_the_first_condition_that_holds_wins() -> None:
    names = ["mu_3", "mu_20", "U_4", "U_6", "U_9", "U_13", "small_1", "small_3", "small_8", "small_30", "limit", "mu_3"]
    v = torch.tensor([1.0, 15.0, 170, 60, 25, 13, 1, 1, 1, 1, 1, 3.2]).double()
    x = torch.tensor([1500.0, 31, 1, 1, 1, 1, 0.5, 2, 5, 15, 0, 2000]).double()
    from dither.kernels.bessel import REGIONS

    assert [REGIONS[code] for code in regions_of(v, x, "paper").tolist()] == names
