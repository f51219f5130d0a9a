"""The public transform against scipy's matrices, direct sums and its own inverse; arrays and tensors, real and complex."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import hadamard as sylvester

from dither.special import apply_hadamard, fwht, fwht_, hadamard


def test_against_scipy_and_direct_sums() -> None:
    for n in (1, 2, 64, 4096):
        x = np.random.default_rng(n).integers(-9, 10, n).astype(float)
        assert np.array_equal(fwht(x), x @ sylvester(n))
    x = np.random.default_rng(0).integers(-9, 10, 1 << 16).astype(float)
    y = fwht(x)
    m = np.arange(1 << 16)
    for k in (0, 1, 77, 65535):
        assert y[k] == (x * (1 - 2 * (np.bitwise_count(m & k) & 1).astype(int))).sum()


@pytest.mark.parametrize("order", [1, 12, 20, 28])
def test_orders_and_transposes(order: int) -> None:
    h = hadamard(order * 32)
    x = torch.randn(2, 3, order * 32, dtype=torch.float64, generator=torch.Generator().manual_seed(order))
    torch.testing.assert_close(fwht(x, True, order=order), x @ h, rtol=0, atol=1e-13)
    torch.testing.assert_close(fwht(x, True, order=order, transpose=True), x @ h.mT, rtol=0, atol=1e-13)
    torch.testing.assert_close(fwht(fwht(x, order=order), order=order, transpose=True), x * h.shape[0], rtol=0, atol=1e-11)
    assert torch.equal(fwht(x.float(), True, order=order), apply_hadamard(x.float()))


def test_complex_numbers_are_two_real_ones() -> None:
    g = torch.Generator().manual_seed(0)
    for dtype in (torch.complex64, torch.complex128):
        for n in (1, 2, 16, 1 << 15):
            x = torch.randn(2, n, dtype=dtype, generator=g)
            expected = torch.complex(fwht(x.real.contiguous()), fwht(x.imag.contiguous()))
            assert torch.equal(fwht(x), expected) and torch.equal(fwht(x.conj()), expected.conj().resolve_conj())
    x = torch.randn(12 * 8, dtype=torch.complex128, generator=g)
    torch.testing.assert_close(fwht(x, True, order=12), x @ hadamard(96).to(x.dtype), rtol=0, atol=1e-13)


def test_in_place_or_not() -> None:
    x = torch.randn(3, 64)
    before = x.clone()
    y = fwht(x)
    assert torch.equal(x, before) and fwht_(x) is x and torch.equal(x, y)
    a = np.random.default_rng(0).standard_normal((3, 64))
    kept = a.copy()
    b = fwht(a)
    assert np.array_equal(a, kept) and fwht_(a) is a and np.array_equal(a, b)
    assert np.array_equal(fwht(kept[::-1, ::2]), fwht(kept[::-1, ::2].copy()))  # strided arrays
    assert torch.equal(fwht(before.T[:, :2].T), fwht(before.T[:, :2].T.contiguous()))
    assert fwht(torch.zeros(0, 4)).shape == (0, 4)


def test_gradients() -> None:
    x = torch.randn(2, 24, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: fwht(t, order=12), x)
    with pytest.raises(ValueError, match=r"^x: wants gradients"):
        fwht_(x, order=12)


@pytest.mark.parametrize(
    ("name", "x", "order"),
    [
        ("x", np.zeros(12), 1),
        ("x", np.zeros(0), 1),
        ("x", np.zeros(()), 1),
        ("x", np.zeros(16), 12),
        ("x", np.zeros(16, dtype=int), 1),
        ("x", np.zeros(16, dtype=np.float16), 1),
        ("x", torch.zeros(16, dtype=torch.int64), 1),
        ("x", torch.zeros(12), 1),
        ("order", torch.zeros(16), 16),
        ("order", torch.zeros(184), 92),
    ],
)
def test_wrong_arguments(name: str, x: Any, order: int) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: "):
        fwht(x, order=order)


def test_what_cannot_be_overwritten() -> None:
    frozen = np.zeros(4)
    frozen.flags.writeable = False
    for x in (frozen, np.zeros(8)[::2], torch.zeros(8)[::2]):
        with pytest.raises(ValueError, match=r"^x: must be contiguous"):
            fwht_(x)
    with pytest.raises(TypeError, match=r"^x: "):
        fwht([1.0, 2.0])  # type: ignore[type-var]
