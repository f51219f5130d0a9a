"""Quantization space utilization: closed forms, what a rotation and a scaling can reach, and areas by Monte Carlo."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dither.quant.qsur import chi_square_quantile, gaussian_qsur, log_ball, qsur, qsur_of
from dither.special import hadamard


def rotation(d: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64)).Q


def covariance(d: int, seed: int = 0) -> Tensor:
    spectrum = torch.logspace(-2, 1, d, dtype=torch.float64)
    q = rotation(d, seed)
    return q @ torch.diag(spectrum) @ q.mT


def test_the_ball() -> None:
    assert log_ball(1) == pytest.approx(0)  # an interval fills itself
    assert 2 * log_ball(2) == pytest.approx(math.log(math.pi / 4))
    assert 3 * log_ball(3) == pytest.approx(math.log(math.pi / 6))
    assert 576 * log_ball(576) / math.log(10) == pytest.approx(-615, abs=1)  # the spec's 1e-615


@pytest.mark.parametrize("d", [1, 2, 7, 64])
def test_the_identity_is_a_ball(d: int) -> None:
    found = gaussian_qsur(3.5 * torch.eye(d))
    assert found.exact == pytest.approx(log_ball(d), abs=1e-12) and found.whitened == log_ball(d)
    assert found.exact_rotated == pytest.approx(log_ball(d), abs=1e-12)
    assert found.paper == pytest.approx(log_ball(d), abs=1e-12)


@pytest.mark.parametrize("d", [2, 4, 12, 36])
def test_klt_and_hadamard_reach_the_bound_and_no_rotation_exceeds_it(d: int) -> None:
    sigma = covariance(d)
    found = gaussian_qsur(sigma)
    eigenvalues, q = torch.linalg.eigh(sigma)
    mean_log, mean = float(eigenvalues.log().mean()), float(eigenvalues.mean())
    bound = log_ball(d) + 0.5 * (mean_log - math.log(mean))
    assert found.exact_rotated == pytest.approx(bound, abs=1e-12)
    r = q @ hadamard(d)
    rotated = gaussian_qsur(r.mT @ sigma @ r)
    assert rotated.exact == pytest.approx(bound, abs=1e-10)
    assert rotated.paper == pytest.approx(found.paper_rotated, abs=1e-10)
    for seed in range(20):
        o = rotation(d, seed)
        other = gaussian_qsur(o.mT @ sigma @ o)
        assert other.exact <= bound + 1e-10 and other.paper <= found.paper_rotated + 1e-10
        assert other.exact_rotated == pytest.approx(bound, abs=1e-9)
        white = q @ torch.diag(eigenvalues.rsqrt()) @ o  # whitening reaches the ball, whatever rotation follows
        assert gaussian_qsur(white.mT @ sigma @ white).exact == pytest.approx(log_ball(d), abs=1e-9)
    assert found.exact < found.exact_rotated < found.whitened


def test_nothing_exceeds_the_ball() -> None:
    sigma = covariance(5)
    for seed in range(50):
        linear = torch.randn(5, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert gaussian_qsur(linear.mT @ sigma @ linear).exact <= log_ball(5) + 1e-9


@pytest.mark.parametrize("mean", [None, torch.tensor([2.0, -0.5], dtype=torch.float64)])
def test_area_by_monte_carlo(mean: Tensor | None) -> None:
    """d = 2: the share of the square's points that lie in the ellipse."""
    sigma = torch.tensor([[2.0, 0.7], [0.7, 0.5]], dtype=torch.float64)
    mu = torch.zeros(2, dtype=torch.float64) if mean is None else mean
    chi2 = chi_square_quantile(2, 0.99)
    reach = (chi2 * sigma.diagonal()).sqrt()
    low, high = float((mu - reach).min()), float((mu + reach).max())
    g = torch.Generator().manual_seed(0)
    points = low + (high - low) * torch.rand(400_000, 2, generator=g, dtype=torch.float64) - mu
    share = float(((points @ torch.linalg.inv(sigma) * points).sum(1) <= chi2).double().mean())
    assert math.exp(2 * gaussian_qsur(sigma, mean).exact) == pytest.approx(share, abs=4 * (share / 400_000) ** 0.5)


def test_chi_square() -> None:
    assert chi_square_quantile(2, 0.99) == pytest.approx(-2 * math.log(0.01), rel=1e-12)
    stats = pytest.importorskip("scipy.stats")
    for d in (1, 5, 576):
        for level in (0.01, 0.5, 0.99):
            assert chi_square_quantile(d, level) == pytest.approx(stats.chi2.ppf(level, d), rel=1e-9)


def test_data_and_its_invariances() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(500, 16, generator=g) @ torch.linalg.cholesky(covariance(16)).mT.float()
    found = qsur(x)
    assert found == pytest.approx(gaussian_qsur(torch.cov(x.double().T, correction=0)).exact, abs=1e-12)
    signs = 2.0 * torch.randint(0, 2, (16,), generator=g) - 1
    for other in (x * 1e-3, x * signs, x[:, torch.randperm(16, generator=g)], x.view(20, 25, 16), x + 5):
        assert qsur(other) == pytest.approx(found, abs=1e-5)
    assert qsur_of(x).exact == found
    scaled = x / x.std(0) * torch.linspace(1, 9, 16)
    assert qsur(scaled) < qsur(x / x.std(0))


def test_flat_data_have_no_volume() -> None:
    g = torch.Generator().manual_seed(0)
    for x in (torch.randn(5, 8, generator=g), torch.ones(9, 3), torch.randn(30, 1, generator=g).expand(30, 4)):
        assert qsur(x) == -math.inf


def test_wrong_arguments() -> None:
    for bad, message in (
        (torch.ones(4), r"\[T, d\]"),
        (torch.ones(1, 3), "two rows"),
        (torch.tensor([[1.0, float("nan")], [0.0, 1.0]]), "finite"),
    ):
        with pytest.raises(ValueError, match=message):
            qsur(bad)
    eye = torch.eye(3)
    for call, message in (
        (lambda: gaussian_qsur(torch.ones(2, 3)), r"\[d, d\]"),
        (lambda: gaussian_qsur(-eye), "semidefinite"),
        (lambda: gaussian_qsur(eye * float("inf")), "finite"),
        (lambda: gaussian_qsur(eye, torch.zeros(2)), "mean"),
        (lambda: gaussian_qsur(eye, torch.zeros(3), 1.0), "level"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
