"""softmax, log-softmax and log-sum-exp of rows: every algorithm and path against float64, and what torch does with rows that have no sum."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from dither import kernels
from dither.kernels import log_softmax_rows, logsumexp_rows, softmax_gradient_rows, softmax_rows
from kernels.problems import unaligned

ALGORITHMS = kernels.SOFTMAX_ALGORITHMS
NUMBERS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# around every vector, block of vectors and piece of a sum; the spec's list and more
LENGTHS = [1, 2, 7, 8, 15, 16, 17, 31, 64, 127, 128, 129, 255, 511, 1000, 4095, 4096, 4097]
NORMAL = 1.2e-38  # below, results may be flushed
INF, NAN = math.inf, math.nan


def cases(n: int) -> dict[str, Tensor]:
    """Rows of ``n`` that are hard on a sum of exponentials, float32 ``[R, n]``."""
    g = torch.Generator().manual_seed(n)
    hot = torch.zeros(3, n)
    hot[torch.arange(3), torch.randint(0, n, (3,), generator=g)] = 80.0
    masked = torch.randn(3, n, generator=g)
    masked[torch.rand(3, n, generator=g) < 0.5] = -INF
    masked[:, n // 2] = 0.5
    return {
        "uniform": torch.rand(3, n, generator=g) * 2000 - 1000,
        "normal": torch.randn(3, n, generator=g),
        "constant": torch.tensor([[0.0], [0.3], [-77.77], [1.1], [88.9], [12345.678], [-123456.7]]).expand(7, n).contiguous(),
        "one hot": hot,
        "falling": torch.linspace(0, -1, n)[None] * torch.tensor([[90.0], [800.0]]) + torch.tensor([[1.0], [500.0]]),
        "rising": torch.linspace(-1, 0, n)[None] * torch.tensor([[90.0], [800.0]]),
        "huge": torch.where(torch.rand(3, n, generator=g) < 0.5, 3e38, -3e38),
        "subnormal": torch.randn(3, n, generator=g) * 1e-40,
        "masked": masked,
        "low": torch.randn(3, n, generator=g) - 1.5e6,
        "high": torch.randn(3, n, generator=g) + 3e6,
    }


def exact(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """softmax, log-softmax and log-sum-exp ``[R, 1]`` in float64."""
    wide = x.double()
    top = wide.amax(-1, keepdim=True)
    e = (wide - top).exp()
    sum = e.sum(-1, keepdim=True)
    return e / sum, wide - top - sum.log(), top + sum.log()


@pytest.mark.parametrize("n", LENGTHS)
def test_error_in_float32(path: str, n: int) -> None:
    for name, x in cases(n).items():
        x = unaligned(x)
        expected, logarithm, log_sum = exact(x)
        seen = expected > NORMAL
        # subtracting the maximum first rounds the difference: by 2^-24 of it, times e^difference
        rounding = 2**-24 * (x.double().amax(-1, keepdim=True) - x).clamp(max=88)
        for algorithm in ALGORITHMS:
            y = softmax_rows(x, algorithm)
            error = (y.double() - expected).abs() / expected
            bound = 1e-6 if algorithm == "two_pass" and path != "reference" and name not in ("low", "high") else 1e-6 + rounding
            assert bool((error <= bound)[seen].all()), (name, algorithm)
            assert float(y[~seen].max() if (~seen).any() else 0) <= NORMAL, (name, algorithm)
        found = logsumexp_rows(x).double()[:, None]
        ulp = torch.from_numpy(np.spacing(log_sum.abs().float().numpy())).double()
        assert bool(((found - log_sum).abs() <= 2 * ulp + 1e-7).all()), name
        y = log_softmax_rows(x)
        inside = logarithm.abs() < 3e38  # -3e38 beside 3e38 gives -inf, as the difference does in float32
        assert bool(((y.double() - logarithm).abs() <= 1e-6 * logarithm.abs().clamp(min=1))[inside].all()), name
        assert bool((y == -INF)[~inside].all())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(("dtype", "relative", "least"), [(torch.float64, 1e-13, 1e-300), (torch.bfloat16, 2**-8 + 1e-6, NORMAL),
                                                         (torch.float16, 2**-11 + 1e-6, 2**-14)])  # fmt: skip
def test_other_types(path: str, algorithm: str, dtype: torch.dtype, relative: float, least: float) -> None:
    """Arithmetic is that of float32 rounded once; float64's own is far more exact than float32's."""
    for n in (1, 3, 8, 16, 17, 33, 129, 4099):
        x = unaligned((torch.randn(3, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64) * 5).to(dtype))
        expected, logarithm, log_sum = exact(x)
        y = softmax_rows(x, algorithm)
        assert y.dtype == dtype
        assert bool(((y.double() - expected).abs() <= relative * expected)[expected > least].all())
        found = logsumexp_rows(x)
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        double = dtype == torch.float64
        torch.testing.assert_close(found.double()[:, None], log_sum, rtol=1e-13 if double else 3e-7, atol=0 if double else 1e-7)
        difference = (log_softmax_rows(x).double() - logarithm).abs()
        assert bool((difference <= relative * logarithm.abs() + (1e-14 if double else 1e-6)).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_are_read_exactly_and_rounded_half_to_even(on: Callable[[str], None], dtype: torch.dtype) -> None:
    """Every number of 16 bits: log-softmax of a row of two subtracts what is, but for rounding, 0 where the other is far below."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for isa in ("scalar", "avx2", "avx512"):
        on(isa)
        single = logsumexp_rows(every[:, None].contiguous())  # e^x alone: its logarithm is x
        finite = every.isfinite() & (every.float().abs() < 1e5)
        torch.testing.assert_close(single[finite], every[finite].float(), rtol=1e-6, atol=2e-7)
        big = every.isfinite() & ~finite
        assert torch.equal(single[big], every[big].float())  # by the maximum, so exactly
        assert bool(single[every.isnan()].isnan().all()) and torch.equal(single[every.isinf()], every[every.isinf()].float())
        x = torch.randn(200, 33, generator=torch.Generator().manual_seed(1)).to(dtype)
        assert torch.equal(softmax_rows(x), softmax_rows(x.float()).to(dtype))
        small = (torch.randn(200, 33, generator=torch.Generator().manual_seed(2)) * 8).to(dtype)  # float16: subnormal results
        assert torch.equal(softmax_rows(small), softmax_rows(small.float()).to(dtype))
        wide = torch.tensor([[0.0, -70000.0, 300.0]]).to(dtype)
        assert torch.equal(log_softmax_rows(wide), log_softmax_rows(wide.float()).to(dtype))  # float16: -inf


@pytest.mark.parametrize("dtype", NUMBERS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_rows_without_a_sum_are_as_in_torch(path: str, algorithm: str, dtype: torch.dtype) -> None:
    rows = torch.tensor([
        [1, 2, 3], [-INF, -INF, -INF], [INF, 1, 2], [NAN, 1, 2], [INF, INF, 1], [-INF, 1, NAN], [INF, NAN, 1], [-INF, 0, 1], [-INF, INF, 1],
        [NAN, NAN, NAN], [NAN, -INF, -INF], [3e38, -3e38, 0], [1e10, 1e10, -INF], [-3e38, -3e38, -3e38], [-2e6, 1 - 2e6, -INF],
        [-INF, -1e6, 1 - 1e6], [2e6, 3e6, 3e6], [-INF, -INF, 5],
    ]).to(dtype)  # fmt: skip
    for width in (3, 40, 70001 if algorithm == "two_pass" else 300):
        x = torch.cat([rows, rows[:, :1].expand(-1, width - 3)], 1).contiguous()
        torch.testing.assert_close(softmax_rows(x, algorithm), x.softmax(-1), equal_nan=True)
        torch.testing.assert_close(log_softmax_rows(x), x.log_softmax(-1), equal_nan=True, rtol=1e-5 if dtype == torch.float32 else None,
                                   atol=1e-5 if dtype == torch.float32 else None)  # fmt: skip
        torch.testing.assert_close(logsumexp_rows(x).to(dtype), x.logsumexp(-1), equal_nan=True)


def test_a_long_row(path: str) -> None:
    """Sums of 2^20 + 3 numbers, whose rounding errors must not add up; several chunks."""
    n = 2**20 + 3
    for x in (torch.randn(1, n, generator=torch.Generator().manual_seed(0)), torch.full((1, n), 0.3), torch.linspace(30, -30, n)[None]):
        expected, _, log_sum = exact(x)
        for algorithm in ("two_pass",) if path == "scalar" else ALGORITHMS:
            y = softmax_rows(x, algorithm).double()
            assert float(((y - expected).abs() / expected).max()) < (1e-6 if algorithm == "two_pass" else 1e-6 + 60 * 2**-24)
            assert float((y.sum() - 1).abs()) < 3e-7
        assert float((logsumexp_rows(x).double() - log_sum).abs()) <= 1e-7 * max(1, float(log_sum))


def test_instruction_sets_agree(on: Callable[[str], None]) -> None:
    x = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0)) * 20
    on("scalar")
    expected = softmax_rows(x), log_softmax_rows(x), logsumexp_rows(x)
    for isa in ("avx2", "avx512"):
        on(isa)
        found = softmax_rows(x), log_softmax_rows(x), logsumexp_rows(x)
        for a, b, least in zip(found, expected, (NORMAL, 2e-7, 0), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=least)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_threads_change_no_bit(on: Callable[[str], None], algorithm: str) -> None:
    """Few long rows are shared by threads, many are not; the second of the rows goes the way without a limit of domain."""
    for isa in ("scalar", "avx2", "avx512"):
        on(isa)
        for shape in ((2, 200_001), (9, 20_000), (1, 300_000)):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 10
            x[-1, ::7] += 3e6
            wide, halves = x, x.to(torch.bfloat16)
            results = []
            for threads in (1, 2, 3, 5):
                torch.set_num_threads(threads)
                y = softmax_rows(wide, algorithm)
                results.append((y, softmax_rows(halves, algorithm), log_softmax_rows(wide), logsumexp_rows(wide), softmax_gradient_rows(y, wide)))
            for found in results[1:]:
                assert all(map(torch.equal, found, results[0]))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_shift_and_order(path: str, algorithm: str) -> None:
    """A power of two added to numbers that stay exact changes nothing beyond rounding; the order of the row changes the sum's rounding alone."""
    g = torch.Generator().manual_seed(3)
    x = torch.randint(-400, 400, (4, 3001), generator=g).float() / 64
    y = softmax_rows(x, algorithm)
    for shift in (2.0**-3, 1.0, 2.0**5, -(2.0**9), 2.0**13):
        torch.testing.assert_close(softmax_rows(x + shift, algorithm), y, rtol=1e-6, atol=0)
    order = torch.randperm(3001, generator=g)
    torch.testing.assert_close(softmax_rows(x[:, order].contiguous(), algorithm), y[:, order], rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", NUMBERS)
def test_in_place_and_past_the_caches(path: str, dtype: torch.dtype) -> None:
    for n in (5, 37, 1003):
        x = unaligned(torch.randn(3, n, generator=torch.Generator().manual_seed(n)).to(dtype))
        for algorithm in ALGORITHMS:
            expected, y = softmax_rows(x, algorithm), x.clone()
            assert softmax_rows(y, algorithm, out=y).data_ptr() == y.data_ptr()
            assert torch.equal(y, expected)
            if algorithm != "reload":
                guard = torch.full((3 * n + 2,), 7.0, dtype=dtype)
                softmax_rows(x, algorithm, stream=True, out=guard[1:-1].view(3, n))
                assert torch.equal(guard[1:-1].view(3, n), expected) and float(guard[0]) == float(guard[-1]) == 7
        y = x.clone()
        log_softmax_rows(y, stream=True, out=y)
        assert torch.equal(y, log_softmax_rows(x))


@pytest.mark.parametrize("dtype", NUMBERS)
def test_gradient(path: str, dtype: torch.dtype) -> None:
    for n in (1, 5, 16, 129, 4100):
        g = torch.Generator().manual_seed(n)
        y = softmax_rows((torch.randn(3, n, generator=g) * 3).to(dtype))
        gradient = torch.randn(3, n, generator=g).to(dtype)
        wide, wider = y.double(), gradient.double()
        expected = wide * (wider - (wide * wider).sum(-1, keepdim=True))
        found = softmax_gradient_rows(y, unaligned(gradient))
        assert found.dtype == dtype
        size = wide * (wider.abs() + (wide * wider).sum(-1, keepdim=True).abs())  # what the difference is rounded against
        unit = torch.finfo(dtype).eps
        assert bool(((found.double() - expected).abs() <= unit * expected.abs() + 2 * min(unit, 2**-23) * size + torch.finfo(dtype).tiny).all())


def test_no_rows(path: str) -> None:
    empty = torch.zeros(0, 5)
    assert softmax_rows(empty).shape == log_softmax_rows(empty).shape == softmax_gradient_rows(empty, empty).shape == (0, 5)
    assert logsumexp_rows(empty).shape == (0,)


def test_the_algorithm_goes_by_the_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dither.kernels.softmax.cache_bytes", lambda level: {2: 1 << 20, 3: 32 << 20}[level])
    assert [kernels.softmax_algorithm(n << 20) for n in (1, 8, 9)] == ["reload", "reload", "two_pass"]
    monkeypatch.setattr("dither.kernels.softmax.cache_bytes", lambda level: {2: 1 << 20, 3: 8 << 20}[level])
    assert [kernels.softmax_algorithm(n << 20) for n in (2, 3)] == ["reload", "two_pass"]


def test_wrong_arguments() -> None:
    x = torch.zeros(2, 12)
    for name, call in [
        ("x", lambda: softmax_rows(x.int())),
        ("x", lambda: softmax_rows(x[0])),
        ("x", lambda: softmax_rows(x.T)),
        ("x", lambda: log_softmax_rows(x[:, ::2])),
        ("x", lambda: logsumexp_rows(torch.zeros(3, 0))),
        ("algorithm", lambda: softmax_rows(x, "three_pass")),
        ("stream", lambda: softmax_rows(x, "reload", stream=True)),
        ("out", lambda: softmax_rows(x, out=torch.zeros(2, 11))),
        ("out", lambda: softmax_rows(x, out=x.double())),
        ("out", lambda: log_softmax_rows(torch.zeros(30)[:24].view(2, 12), out=torch.zeros(24, 2).T)),
        ("y", lambda: softmax_gradient_rows(x[0], x)),
        ("g", lambda: softmax_gradient_rows(x, x.double())),
        ("g", lambda: softmax_gradient_rows(x, x[:, :6].contiguous())),
        ("level", lambda: kernels.cache_bytes(4)),
    ]:
        with pytest.raises(ValueError, match=f"^{name}: "):
            call()
    shared = torch.zeros(30)
    with pytest.raises(ValueError, match="shares a part"):
        softmax_rows(shared[:24].view(2, 12), out=shared[6:].view(2, 12))
