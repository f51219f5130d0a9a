"""Hadamard matrices: orders, orthogonality, which are symmetric; fast products against the matrix in float64."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from dither.special import apply_hadamard, factors, hadamard, random_hadamard, random_rotation
from dither.special.hadamard import random_signs
from dither.special.paley import paley, paley_order

ORDERS = [1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 60, 64, 100, 144, 240, 244, 344, 576, 1536]


@pytest.mark.parametrize("n", ORDERS)
def test_orthogonal_with_equal_entries(n: int) -> None:
    h = hadamard(n)
    assert h.dtype == torch.float64 and math.prod(factors(n)) == n
    assert torch.equal((h * math.sqrt(n)).round().abs(), torch.ones(n, n, dtype=torch.float64))
    assert float((h @ h.mT - torch.eye(n, dtype=torch.float64)).abs().max()) < 1e-13


def test_factors() -> None:
    """The sizes of SmolLM2, and of larger models; the power of two comes last."""
    assert factors(576) == (12, 12, 4)
    assert factors(1536) == (12, 128)
    assert factors(1) == (1,) and factors(64) == (64,) and factors(12) == (12,) and factors(24) == (12, 2)
    assert factors(14336) == (28, 512) and factors(11008) == (344, 32) and factors(5120) == (20, 256)
    for n in (3, 6, 9, 92, 1000003):
        with pytest.raises(ValueError, match=f"{n};"):
            factors(n)
        with pytest.raises(ValueError, match=f"{n};"):
            apply_hadamard(torch.ones(1, n))
    with pytest.raises(ValueError, match="at least 1"):
        hadamard(0)


@pytest.mark.parametrize("q", [5, 9, 11, 13, 17, 19, 23, 25, 27, 29, 49, 121, 125])
def test_paley_over_every_kind_of_field(q: int) -> None:
    """q prime, a square and a cube, 1 and 3 mod 4."""
    order = q + 1 if q % 4 == 3 else 2 * (q + 1)
    h = paley(order).double()
    assert torch.equal(h @ h.mT, len(h) * torch.eye(len(h), dtype=h.dtype))


def test_paley_orders() -> None:
    known = {n for n in range(8, 160, 4) if paley_order(n) is not None}
    assert {12, 20, 28, 36, 44, 52, 60, 68, 76, 84, 100, 108, 124, 132, 140, 148} <= known and not {
        92,
        116,
        156,
    } & known
    with pytest.raises(ValueError, match="92"):
        paley(92)


def test_symmetry() -> None:
    for n in (2, 64, 36, 52, 72):
        assert torch.equal(hadamard(n), hadamard(n).mT)
    for n in (12, 20, 24, 576):
        assert not torch.equal(hadamard(n), hadamard(n).mT)


@functools.cache
def matrix_of(n: int) -> torch.Tensor:
    return hadamard(n)


@pytest.mark.parametrize("n", ORDERS)
@pytest.mark.parametrize("transpose", [False, True])
def test_products(n: int, transpose: bool) -> None:
    """Blocks of n along the last dimension, every dtype, with and without gradients."""
    h = matrix_of(n).mT if transpose else matrix_of(n)
    x = torch.randn(2, 3, 2 * n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    expected = (x.view(2, 3, 2, n) @ h).view(x.shape)
    for dtype, tolerance in (
        (torch.float64, 1e-13),
        (torch.float32, 2e-6),
        (torch.bfloat16, 2e-2),
        (torch.float16, 2e-3),
    ):
        y = apply_hadamard(x.to(dtype), n, transpose=transpose)
        assert y.dtype == dtype and y.shape == x.shape
        assert float((y.double() - expected).norm() / expected.norm()) < tolerance
    wanted = x.float().requires_grad_()
    apply_hadamard(wanted, n, transpose=transpose).backward(expected.float())
    assert wanted.grad is not None  # y = x H, so the gradient of x is that of y times H^T
    assert float((wanted.grad.double() - x).norm() / x.norm()) < 2e-6


def test_transpose_is_the_inverse() -> None:
    x = torch.randn(5, 576, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(apply_hadamard(apply_hadamard(x), transpose=True), x, rtol=0, atol=1e-13)


def test_views_and_empty_tensors() -> None:
    x = torch.randn(24, 7, generator=torch.Generator().manual_seed(0)).T  # not contiguous
    torch.testing.assert_close(apply_hadamard(x), x @ hadamard(24).float())
    assert apply_hadamard(torch.zeros(0, 12)).shape == (0, 12)
    with pytest.raises(ValueError, match="divide"):
        apply_hadamard(torch.zeros(2, 30), 12)
    with pytest.raises(ValueError, match="floating"):
        apply_hadamard(torch.zeros(2, 12, dtype=torch.int64))


def test_random_signs_and_the_fallback() -> None:
    x = torch.randn(3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    r = random_hadamard(12, 5)
    torch.testing.assert_close(x @ r, apply_hadamard(x * random_signs(12, 5)))
    assert torch.equal(r, random_hadamard(12, 5)) and not torch.equal(r, random_hadamard(12, 6))
    assert torch.equal(random_rotation(12, 5), r)
    q = random_rotation(15, 5)
    torch.testing.assert_close(q @ q.mT, torch.eye(15, dtype=torch.float64))
    with pytest.raises(ValueError, match="at least 1"):
        random_rotation(0, 0)
