"""Hadamard products: every path against the matrix in float64, and all instruction sets against one another, bit for bit."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dither.kernels import hadamard_rows
from dither.special import apply_hadamard, hadamard
from kernels.problems import unaligned

# powers of two around every vector; one dense factor of each remainder; merged tails; several factors
SIZES = [1, 2, 4, 8, 12, 16, 20, 24, 32, 36, 40, 44, 48, 60, 64, 80, 144, 192, 256, 320, 576, 768, 1024, 1536, 2048, 2880]


def signs(size: int, seed: int) -> Tensor:
    return 2.0 * torch.randint(0, 2, (size, size), generator=torch.Generator().manual_seed(seed)) - 1


@functools.cache
def matrix_of(n: int) -> Tensor:
    return hadamard(n)


@pytest.mark.parametrize("n", [n for n in SIZES if n <= 1024])
def test_matches_float64(path: str, n: int) -> None:
    x = torch.randn(5, n, generator=torch.Generator().manual_seed(n))
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 5e-3)):
        rows = unaligned(x.to(dtype))
        for transpose in (False, True):
            h = matrix_of(n).mT if transpose else matrix_of(n)
            expected = rows.double() @ h
            y = apply_hadamard(rows, transpose=transpose)
            assert y.dtype == dtype
            assert float((y.double() - expected).norm() / expected.norm()) < tolerance


@pytest.mark.parametrize(("sizes", "power"), [((1,), 1), ((3,), 1), ((17,), 1), ((5, 16), 1), ((3, 19), 1), ((2, 33), 1),
                                              ((7,), 16), ((13, 14), 32), ((2, 3, 21), 1)])  # fmt: skip
def test_any_sign_matrices(path: str, sizes: tuple[int, ...], power: int) -> None:
    """Sizes that no Hadamard matrix has reach every remainder of the loops. Small integers times a power of two are exact."""
    dense = [signs(d, d) for d in sizes]
    matrix = torch.ones(1, 1)
    for d in dense:
        matrix = torch.kron(matrix, d)
    matrix = torch.kron(matrix, (hadamard(power) * math.sqrt(power)).round().float())
    n = len(matrix)
    x = torch.randint(-4, 5, (14, n), generator=torch.Generator().manual_seed(n)).float()
    y = hadamard_rows(x, dense, power)
    torch.testing.assert_close(y.double(), x.double() @ matrix.double() / math.sqrt(n), rtol=1e-5, atol=2e-6 * n)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_instruction_sets_agree(on: Callable[[str], None], n: int, dtype: torch.dtype) -> None:
    x = torch.randn(3, n, generator=torch.Generator().manual_seed(n)).to(dtype)
    on("scalar")
    expected = apply_hadamard(x)
    for isa in ("avx2", "avx512"):
        on(isa)
        assert torch.equal(apply_hadamard(x), expected)


def test_threads_do_not_change_results(path: str) -> None:
    x = torch.randn(200, 576, generator=torch.Generator().manual_seed(0))
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(apply_hadamard(x))
    if path == "reference":  # torch's matrix product may split its sums by the number of threads
        torch.testing.assert_close(*results)
    else:
        assert torch.equal(*results)


def test_bfloat16_is_rounded_once(path: str) -> None:
    """Half to even, as torch rounds; NaN and inf reach their whole row and no other."""
    x = torch.randint(-64, 65, (50, 64), generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    assert torch.equal(apply_hadamard(x), (x.double() @ hadamard(64)).to(torch.bfloat16))
    for n in (64, 12, 576):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.ones(3, n, dtype=dtype)
            x[1, 5], x[2, 7] = float("nan"), float("inf")
            y = apply_hadamard(x)
            assert bool(torch.isfinite(y[0]).all()) and bool(y[1].isnan().all())
            assert not bool(torch.isfinite(y[2]).any())


def test_no_rows(path: str) -> None:
    assert hadamard_rows(torch.zeros(0, 12), [signs(12, 0)]).shape == (0, 12)


def test_wrong_arguments() -> None:
    x, d = torch.zeros(2, 12), signs(12, 0)
    for name, call in [
        ("x", lambda: hadamard_rows(x.double(), [d])),
        ("x", lambda: hadamard_rows(x[0], [d])),
        ("x", lambda: hadamard_rows(torch.zeros(12, 12).T[:2], [d])),
        ("x", lambda: hadamard_rows(x[:, :6].contiguous(), [d])),
        ("x", lambda: hadamard_rows(torch.zeros(2, 0), [torch.zeros(0, 0)])),
        (r"dense\[0\]", lambda: hadamard_rows(x, [d.double()])),
        (r"dense\[0\]", lambda: hadamard_rows(x, [d[:, :6].contiguous()])),
        (r"dense\[0\]", lambda: hadamard_rows(x, [d[0]])),
        ("dense", lambda: hadamard_rows(torch.zeros(2, 144), [d, d])),
        ("dense", lambda: hadamard_rows(x, [])),
        ("power", lambda: hadamard_rows(torch.zeros(2, 96), [d], 8)),
        ("power", lambda: hadamard_rows(torch.zeros(2, 288), [d], 24)),
        ("power", lambda: hadamard_rows(torch.zeros(2, 288), [d], -16)),
    ]:
        with pytest.raises(ValueError, match=f"^{name}: "):
            call()
