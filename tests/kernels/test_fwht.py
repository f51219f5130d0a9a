"""Transforms in place: every path against matrices and float64; instruction sets against one another and the kernel of rows, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from scipy.linalg import hadamard as sylvester
from torch import Tensor

from dither.kernels import fwht_rows, hadamard_rows
from kernels.problems import unaligned


def signs(size: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return (2 * torch.randint(0, 2, (size, size), generator=torch.Generator().manual_seed(seed)) - 1).to(dtype)


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(shape[-1])).to(dtype)


def matrix(power: int, inner: int = 1, front: Tensor | None = None) -> Tensor:
    walsh = torch.kron(torch.from_numpy(sylvester(power)).double(), torch.eye(inner, dtype=torch.float64))
    return walsh if front is None else torch.kron(front.double(), walsh)


@pytest.mark.parametrize("levels", range(11))
@pytest.mark.parametrize("inner", [1, 2])
def test_matches_the_matrix(path: str, levels: int, inner: int) -> None:
    """Every length around the vectors and passes; rows that fill vectors and rows that do not."""
    h = matrix(1 << levels, inner)
    for rows in (1, 3, 8):
        for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-15)):
            x = unaligned(random(rows, inner << levels, dtype=dtype))
            expected = x.double() @ h
            y = fwht_rows(x, inner=inner)
            assert y.data_ptr() == x.data_ptr() and y.dtype == dtype
            assert float((y.double() - expected).norm() / expected.norm()) < tolerance * (levels + 1)


@pytest.mark.parametrize("d", [1, 3, 7, 12, 20, 33])
@pytest.mark.parametrize("levels", [0, 1, 2, 3, 4, 6])
def test_a_matrix_in_front(path: str, d: int, levels: int) -> None:
    """Sizes that no Hadamard matrix has reach every remainder of the loops; whole numbers are exact."""
    for inner, dtype in ((1, torch.float32), (2, torch.float64)):
        front = signs(d, dtype, d)
        x = torch.randint(-8, 9, (5, d * inner << levels), generator=torch.Generator().manual_seed(d)).to(dtype)
        expected = x.double() @ matrix(1 << levels, inner, front)
        assert torch.equal(fwht_rows(x, front, inner=inner).double(), expected)


@pytest.mark.parametrize(("levels", "dtype"), [(17, torch.float64), (18, torch.float32), (21, torch.float32), (23, torch.float64)])
def test_rows_longer_than_a_cache(path: str, levels: int, dtype: torch.dtype) -> None:
    """The passes over columns, with few and with many levels, and streamed ones: whole numbers against a sparse signal's closed form."""
    n = 1 << levels
    x = torch.zeros(1, n, dtype=dtype)
    where = torch.tensor([0, 5, n // 3, n - 1])
    what = torch.tensor([3.0, -1.0, 2.0, 7.0], dtype=dtype)
    x[0, where] = what
    y = fwht_rows(x)[0]
    k = torch.randint(0, n, (3000,), generator=torch.Generator().manual_seed(0))
    both = k[:, None] & where
    parity = torch.zeros_like(both)
    for bit in range(levels):
        parity ^= both >> bit & 1
    assert torch.equal(y[k], ((1 - 2 * parity).to(dtype) * what).sum(1))
    assert float((y.double() ** 2).sum()) == n * float((what**2).sum())  # Parseval, over all of it


def test_long_rows_in_a_batch_with_a_front_and_threads(path: str) -> None:
    front = signs(12, torch.float32)
    x = random(2, 12 << 14, dtype=torch.float32)
    expected = torch.einsum("rjc,ji->ric", x.double().view(2, 12, -1), front.double())
    expected = (expected.reshape(-1, 128, 128).permute(0, 2, 1).reshape(-1, 128) @ matrix(128)).reshape(-1, 128, 128)
    expected = (expected.permute(0, 2, 1).reshape(-1, 128) @ matrix(128)).reshape(2, -1)
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(fwht_rows(x.clone(), front))
        assert float((results[-1].double() - expected).norm() / expected.norm()) < 1e-6
    assert path == "reference" or torch.equal(*results)


@pytest.mark.parametrize("n", [1, 2, 8, 16, 64, 2048, 1 << 16, 1 << 17, 1 << 20, 12, 48, 1536, 20 << 14])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_instruction_sets_agree(on: Callable[[str], None], n: int, dtype: torch.dtype) -> None:
    front = next((signs(d, dtype) for d in (12, 20) if n % d == 0), None)
    x = random(3 if n < 1 << 15 else 1, n, dtype=dtype)
    scale = 1 / math.sqrt(n)
    on("scalar")
    expected = fwht_rows(x.clone(), front, scale=scale)
    for isa in ("avx2", "avx512"):
        on(isa)
        assert torch.equal(fwht_rows(x.clone(), front, scale=scale), expected)


@pytest.mark.parametrize(("d", "power"), [(1, 16), (1, 1024), (12, 128), (20, 256)])
def test_the_same_bits_as_products_of_rows(path: str, d: int, power: int) -> None:
    dense = [signs(d, torch.float32)] if d > 1 else []
    x = random(4, d * power, dtype=torch.float32)
    scale = float(torch.tensor(1 / math.sqrt(d * power), dtype=torch.float32))
    one, other = hadamard_rows(x, dense, power), fwht_rows(x.clone(), *dense, scale=scale)
    if path == "reference":  # torch's matrix product may sum in another order
        torch.testing.assert_close(one, other)
    else:
        assert torch.equal(one, other)


def test_not_finite_numbers_reach_their_row_and_no_other(path: str) -> None:
    for n in (4, 64, 4096):
        x = torch.ones(3, n)
        x[1, 1], x[2, 3] = float("nan"), float("inf")
        y = fwht_rows(x)
        assert bool(torch.isfinite(y[0]).all()) and bool(y[1].isnan().all()) and not bool(torch.isfinite(y[2]).any())


def test_no_rows(path: str) -> None:
    assert fwht_rows(torch.zeros(0, 16)).shape == (0, 16)


def test_wrong_arguments() -> None:
    x = torch.zeros(2, 24)
    for name, call in [
        ("x", lambda: fwht_rows(x)),
        ("x", lambda: fwht_rows(x.half())),
        ("x", lambda: fwht_rows(x[0])),
        ("x", lambda: fwht_rows(torch.zeros(8, 8).T[:2])),
        ("x", lambda: fwht_rows(torch.zeros(2, 0))),
        ("x", lambda: fwht_rows(torch.zeros(2, 8), signs(12, torch.float32))),
        ("x", lambda: fwht_rows(torch.zeros(2, 1), inner=2)),
        ("inner", lambda: fwht_rows(x, inner=3)),
        ("signs", lambda: fwht_rows(x, signs(12, torch.float64))),
        ("signs", lambda: fwht_rows(x, signs(12, torch.float32)[:, :6].contiguous())),
        ("signs", lambda: fwht_rows(x, signs(12, torch.float32)[0])),
        ("signs", lambda: fwht_rows(torch.zeros(2, 2048), torch.ones(2048, 2048))),
    ]:
        with pytest.raises(ValueError, match=f"^{name}: "):
            call()
