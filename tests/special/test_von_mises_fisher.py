"""The von Mises-Fisher distribution against scipy where that works, closed forms, its own samples, and fits up to 32,768 dimensions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from dither.special import VonMisesFisher, bessel_ratio
from dither.special.von_mises_fisher import cosine_gradient
from dither.special.von_mises_fisher_fit import Fit, fit_concentration


def axis(p: int) -> Tensor:
    generator = torch.Generator().manual_seed(p)
    return torch.nn.functional.normalize(torch.randn(p, generator=generator, dtype=torch.float64), dim=0)


def draw(p: int, kappa: float, n: int, seed: int = 0) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return VonMisesFisher(axis(p), kappa).sample((n,))


@pytest.mark.parametrize(("p", "kappa"), [(2, 3.0), (3, 0.01), (3, 50.0), (7, 4.0), (50, 200.0), (100, 1.0)])
def test_against_scipy(p: int, kappa: float) -> None:
    ours, theirs = VonMisesFisher(axis(p), kappa), scipy.stats.vonmises_fisher(axis(p).numpy(), kappa)
    points = draw(p, kappa, 20)
    np.testing.assert_allclose(ours.log_prob(points).numpy(), theirs.logpdf(points.numpy()), rtol=1e-10)
    np.testing.assert_allclose(float(ours.entropy()), theirs.entropy(), rtol=1e-9)


def test_three_dimensions_have_a_closed_form() -> None:
    """C_3 = kappa / (4 pi sinh kappa), A_3 = coth kappa - 1 / kappa."""
    kappa = torch.tensor([1e-6, 0.5, 20.0, 1e5], dtype=torch.float64)
    d = VonMisesFisher(axis(3), kappa)
    log_sinh = kappa + torch.log(-torch.expm1(-2 * kappa)) - math.log(2)
    torch.testing.assert_close(d.log_normalizer(), torch.log(kappa / (4 * math.pi)) - log_sinh, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(d.mean_cosine()[1:], (1 / torch.tanh(kappa) - 1 / kappa)[1:], rtol=1e-13, atol=0)


@pytest.mark.parametrize("p", [8192, 32768])
def test_where_scipy_fails(p: int) -> None:
    """The density integrates to 1: that of the cosine, exp(kappa w) (1 - w^2)^((p-3)/2) C_p times the area of the sphere below, by quadrature."""
    kappa = p / 2
    d = VonMisesFisher(axis(p), kappa)
    centre, width = float(d.mean_cosine()), 12 / math.sqrt(p)
    w = torch.linspace(centre - width, min(centre + width, 1 - 1e-9), 20001, dtype=torch.float64)
    area = math.log(2) + (p - 1) / 2 * math.log(math.pi) - math.lgamma((p - 1) / 2)
    density = torch.exp(d.log_normalizer() + kappa * w + (p - 3) / 2 * torch.log1p(-w * w) + area)
    assert abs(float(torch.trapezoid(density, w)) - 1) < 1e-9
    with np.errstate(all="ignore"):
        assert not np.isfinite(scipy.stats.vonmises_fisher(axis(p).numpy(), kappa).logpdf(axis(p).numpy()))


def test_entropy_is_the_mean_of_minus_log_density() -> None:
    for p, kappa in ((3, 2.0), (64, 100.0), (2048, 4000.0)):
        d = VonMisesFisher(axis(p), kappa)
        logs = -d.log_prob(draw(p, kappa, 2000))
        assert abs(float(logs.mean() - d.entropy())) < 4 * float(logs.std()) / math.sqrt(2000)


@pytest.mark.parametrize(("p", "kappa"), [(2, 0.1), (2, 5.0), (3, 1.0), (3, 1e5), (10, 1e-6), (50, 40.0), (2048, 500.0), (8192, 5e4)])
def test_samples(p: int, kappa: float) -> None:
    """Unit length; the mean of the cosine is A, its variance A'; the rest has no direction."""
    n = 4000 if p < 1000 else 400
    points, mu = draw(p, kappa, n), axis(p)
    assert bool(((points.norm(dim=1) - 1).abs() < 1e-12).all())
    cosine = points @ mu
    k = torch.tensor(kappa, dtype=torch.float64, requires_grad=True)
    a = bessel_ratio(p / 2 - 1, k)
    (variance,) = torch.autograd.grad(a, k)
    assert abs(float(cosine.mean() - a.detach())) < 4 * math.sqrt(float(variance) / n)
    assert abs(float(cosine.var() / variance) - 1) < 8 / math.sqrt(n)
    rest = points - cosine[:, None] * mu
    assert float(rest.mean(0).norm()) < 1.5 * float(rest.norm(dim=1).mean()) * math.sqrt((1 if p > 10 else 3) / n)


@pytest.mark.parametrize(("p", "kappa"), [(2, 3.0), (3, 2.0), (10, 0.1), (50, 40.0), (2048, 500.0)])
def test_gradients_of_samples(p: int, kappa: float) -> None:
    """Mean of dw/dkappa is A' and mean of 2 w dw/dkappa is the derivative of E w^2 = 1 - (p - 1) A / kappa."""
    n = 20_000
    k = torch.full((), kappa, dtype=torch.float64, requires_grad=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        w = (VonMisesFisher(axis(p), kappa).sample((n,)) if p < 100 else draw(p, kappa, 2000)) @ axis(p)
    n = len(w)
    gradient = cosine_gradient(torch.full_like(w, kappa), w, p)
    a = bessel_ratio(p / 2 - 1, k)
    first, second = (torch.autograd.grad(f, k, retain_graph=True)[0] for f in (a, 1 - (p - 1) * a / k))
    for samples, expected in ((gradient, first), (2 * w * gradient, second)):
        assert abs(float(samples.mean() - expected)) < 4 * float(samples.std()) / math.sqrt(n)


def test_gradient_of_a_sample_in_three_dimensions() -> None:
    """F(w) = (e^(kappa w) - e^-kappa) / (2 sinh kappa) inverts to w = 1 + log(u + (1 - u) e^(-2 kappa)) / kappa."""
    u = torch.linspace(0.001, 0.999, 99, dtype=torch.float64)
    for kappa in (0.3, 2.0, 40.0, 1e4):
        k = torch.full_like(u, kappa, requires_grad=True)
        w = 1 + torch.log(u + (1 - u) * torch.exp(-2 * k)) / k
        (expected,) = torch.autograd.grad(w.sum(), k)
        found = cosine_gradient(k.detach(), w.detach(), 3)
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9 * float(expected.abs().max()))


def test_rsample_reaches_its_parameters() -> None:
    loc, kappa = axis(5).requires_grad_(), torch.tensor([2.0, 30.0], dtype=torch.float64, requires_grad=True)
    points = VonMisesFisher(loc, kappa).rsample((7,))
    assert points.shape == (7, 2, 5)
    (points @ axis(5)).sum().backward()
    assert loc.grad is not None and kappa.grad is not None and bool((kappa.grad > 0).all())
    log = VonMisesFisher(loc, kappa).log_prob(points.detach())
    assert torch.autograd.grad(log.sum(), kappa)[0].shape == (2,)


def test_shapes_and_types() -> None:
    d = VonMisesFisher(axis(4).float().expand(3, 4), torch.tensor([[1.0], [2.0]]))
    assert d.batch_shape == (2, 3) and d.event_shape == (4,) and d.sample((5,)).shape == (5, 2, 3, 4)
    assert d.sample().dtype == d.log_prob(d.sample()).dtype == torch.float32
    assert d.mean.shape == (2, 3, 4) and d.entropy().shape == (2, 3)


# -- fits --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("p", "kappa"), [(3, 5.0), (3, 5e4), (64, 500.0), (2048, 5e3)])
def test_maximum_likelihood(p: int, kappa: float) -> None:
    fit = VonMisesFisher.fit(draw(p, kappa, 500))
    assert fit.fitted is not None and fit.fitted.steps <= 8
    assert abs(fit.fitted.concentration - kappa) < 4 * fit.fitted.standard_error
    # the likelihood is flat there and lower on both sides
    a = float(bessel_ratio(p / 2 - 1, fit.fitted.concentration))
    assert math.isclose(a, fit.fitted.mean_length, rel_tol=1e-12)
    best = fit.fitted.log_likelihood
    points = draw(p, kappa, 500)
    assert math.isclose(best, float(fit.log_prob(points).sum()), rel_tol=1e-9, abs_tol=1e-6)
    for factor in (0.99, 1.01):
        assert float(VonMisesFisher(fit.loc, factor * fit.concentration).log_prob(points).sum()) < best


@pytest.mark.parametrize(("p", "kappa"), [(2048, 500.0), (8192, 500.0), (32768, 500.0), (32768, 5e4)])
def test_the_marginal_estimate_in_many_dimensions(p: int, kappa: float) -> None:
    """From the length of the mean alone, drawn from its distribution: |sum y|^2 = (sum w)^2 + |rest|^2, the rest a Gaussian walk for large p."""
    n = 1000
    generator = torch.Generator().manual_seed(p)
    a = float(bessel_ratio(p / 2 - 1, kappa))
    noise = float(torch.randn((), generator=generator, dtype=torch.float64))
    variance = 1 - a * a - (p - 1) * a / kappa
    along = n * a + math.sqrt(n * variance) * noise
    across = n * (1 - a * a - variance)
    r = math.sqrt(along**2 + across) / n
    likelihood, marginal = (fit_concentration(r, n, p, estimator) for estimator in ("likelihood", "marginal"))
    assert abs(marginal.concentration - kappa) < 4 * marginal.standard_error
    assert likelihood.concentration > marginal.concentration
    low, high = marginal.interval(0.99)
    assert low < kappa < high and low < marginal.concentration < high
    again = likelihood.interval(0.99)
    assert math.isclose(again[0], low, rel_tol=1e-6) and math.isclose(again[1], high, rel_tol=1e-6)
    if p > 10 * kappa:
        assert likelihood.concentration > kappa + 4 * likelihood.standard_error  # what the marginal estimate is for


def test_intervals_cover_as_often_as_they_say() -> None:
    """80 % of 60 samples of 40 points in R^6: kappa, and the direction."""
    p, kappa, n = 6, 8.0, 40
    found = [VonMisesFisher.fit(draw(p, kappa, n, seed), estimator="marginal") for seed in range(60)]
    fits = [f.fitted for f in found if f.fitted is not None]
    inside = sum(low < kappa < high for low, high in (f.interval(0.8) for f in fits))
    near = sum(math.acos(min(1.0, float(f.loc @ axis(p)))) < f.fitted.direction_angle(0.8) for f in found if f.fitted is not None)
    for count in (inside, near):
        assert abs(count - 48) < 4 * math.sqrt(60 * 0.8 * 0.2)


def test_the_angle_of_a_circle() -> None:
    """On the circle the mean's direction is von Mises; of two opposite directions nothing is known."""
    assert math.isclose(Fit(10.0, 0.5, 20, 2, "likelihood", 1).direction_angle(0.9), float(scipy.stats.vonmises(100).ppf(0.95)), rel_tol=1e-3)
    assert Fit(1e-3, 1e-3, 20, 3, "likelihood", 1).direction_angle(0.95) > 2.6  # nearly uniform on the sphere: arccos(-0.9)


def test_normalising_and_arrays() -> None:
    points = draw(8, 20.0, 100)
    scaled = points * torch.linspace(1, 9, 100, dtype=torch.float64)[:, None]
    a, b = VonMisesFisher.fit(points.numpy()), VonMisesFisher.fit(scaled.float(), normalize=True)
    assert math.isclose(float(a.concentration), float(b.concentration), rel_tol=1e-5) and b.loc.dtype == torch.float32


def test_wrong_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", False)  # as torch.compile leaves it
    unit = axis(3)
    one = unit.expand(5, 3)
    for name, call in [
        ("loc", lambda: VonMisesFisher(torch.ones(1), 1.0)),
        ("loc", lambda: VonMisesFisher(torch.ones(3), 1.0)),
        ("loc", lambda: VonMisesFisher(torch.ones(3, dtype=torch.int64), 1.0)),
        (r".*concentration", lambda: VonMisesFisher(unit, -1.0)),
        (r".*concentration", lambda: VonMisesFisher(unit, 0.0)),
        ("value", lambda: VonMisesFisher(unit, 1.0).log_prob(torch.ones(4))),
        ("value", lambda: VonMisesFisher(unit, 1.0).log_prob(torch.ones(3))),
        ("features", lambda: VonMisesFisher.fit(unit)),
        ("features", lambda: VonMisesFisher.fit(unit[None])),
        ("features", lambda: VonMisesFisher.fit(torch.ones(5, 1))),
        ("features", lambda: VonMisesFisher.fit(torch.ones(5, 3, dtype=torch.int64))),
        ("features", lambda: VonMisesFisher.fit(2 * draw(3, 5.0, 9))),
        ("features", lambda: VonMisesFisher.fit(one * math.nan)),
        ("features: row 1 is zero", lambda: VonMisesFisher.fit(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), normalize=True)),
        ("features: .* infinite", lambda: VonMisesFisher.fit(torch.eye(3, dtype=torch.float64)[[0, 0, 0]])),
        ("features: .* no direction", lambda: VonMisesFisher.fit(torch.eye(3, dtype=torch.float64)[[0, 0]] * torch.tensor([[1.0], [-1.0]]))),
        ("features: .* no longer", lambda: fit_concentration(0.01, 100, 500, "marginal")),
        ("estimator", lambda: VonMisesFisher.fit(draw(3, 5.0, 9), estimator="bayes")),
        ("level", lambda: fit_concentration(0.5, 100, 5).interval(1.0)),
        ("level", lambda: fit_concentration(0.5, 100, 5).direction_angle(0.0)),
    ]:
        with pytest.raises(ValueError, match=f"^{name}"):
            call()
