"""Gram matrices: every path against float64, on shapes around every vector, panel and chunk."""

from __future__ import annotations

import pytest
import torch

from dither.kernels import gram_finish, gram_update
from kernels.problems import unaligned


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "columns"),
    [(1, 1), (2, 3), (3, 7), (5, 15), (7, 16), (4, 17), (9, 31), (6, 33), (11, 47), (8, 48), (3, 49), (13, 64),
     (513, 50), (1025, 97), (511, 96), (40, 576)],
)
def test_matches_float64(path: str, rows: int, columns: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(rows * columns)
    x = torch.randn(rows, columns, generator=g).to(dtype)
    start = torch.randn(columns, columns, generator=g, dtype=torch.float64)
    start = start + start.T
    h = unaligned(start)
    gram_update(h, unaligned(x))
    gram_update(h, unaligned(x))
    expected = start + 2 * x.double().T @ x.double()
    finished = gram_finish(h)
    assert finished.data_ptr() == h.data_ptr()
    assert torch.equal(finished, finished.T)
    # float32 sums over at most 512 rows: an error of some sqrt(512) units of the largest partial sum
    torch.testing.assert_close(finished, expected, rtol=0, atol=4e-6 * float(expected.diagonal().max()))


@pytest.mark.parametrize("columns", [1, 2, 31, 32, 33, 95, 200])
def test_small_integers_are_exact(path: str, columns: int) -> None:
    """Sums of products of small integers are exact in float32 and bfloat16 products alike: any lost or doubled entry
    shows.
    """
    x = torch.randint(-4, 5, (700, columns), generator=torch.Generator().manual_seed(columns))
    for dtype in (torch.float32, torch.bfloat16):
        h = torch.zeros(columns, columns, dtype=torch.float64)
        gram_update(h, x.to(dtype))
        assert torch.equal(gram_finish(h), (x.T @ x).double())


def test_finish_in_the_middle_changes_nothing(path: str) -> None:
    x = torch.randint(-4, 5, (60, 70), generator=torch.Generator().manual_seed(0)).float()
    h = torch.zeros(70, 70, dtype=torch.float64)
    gram_update(h, x[:20])
    gram_finish(h)
    gram_update(h, x[20:])
    assert torch.equal(gram_finish(gram_finish(h)), (x.T @ x).double())


def test_threads_do_not_change_results(path: str) -> None:
    if path == "reference":
        pytest.skip("torch's matrix product may split its sums by the number of threads")
    x = torch.randn(600, 200, generator=torch.Generator().manual_seed(0))
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        h = torch.zeros(200, 200, dtype=torch.float64)
        gram_update(h, x)
        results.append(gram_finish(h))
    assert torch.equal(*results)


def test_no_rows_and_no_columns(path: str) -> None:
    h = torch.ones(3, 3, dtype=torch.float64)
    gram_update(h, torch.zeros(0, 3))
    assert bool((gram_finish(h) == 1).all())
    gram_update(torch.zeros(0, 0, dtype=torch.float64), torch.zeros(4, 0))


def test_not_finite_rows_show(path: str) -> None:
    """NaN and inf must reach H, where they are looked for, and not vanish in a padded lane."""
    for bad in (float("nan"), float("inf")):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.ones(5, 20, dtype=dtype)
            x[4, 19] = bad
            h = torch.zeros(20, 20, dtype=torch.float64)
            gram_update(h, x)
            assert not bool(torch.isfinite(gram_finish(h)[19]).any())
            assert bool(torch.isfinite(h[:19, :19]).all())


def test_wrong_arguments() -> None:
    h, x = torch.zeros(4, 4, dtype=torch.float64), torch.zeros(5, 4)
    for name, call in [
        ("hessian", lambda: gram_update(h.float(), x)),
        ("hessian", lambda: gram_update(h[:3, :3].contiguous(), x)),
        ("hessian", lambda: gram_update(torch.zeros(8, 8, dtype=torch.float64)[:4, :4], x)),
        ("x", lambda: gram_update(h, x.half())),
        ("x", lambda: gram_update(h, x[0])),
        ("x", lambda: gram_update(h, torch.zeros(4, 5).T)),
        ("hessian", lambda: gram_finish(torch.zeros(3, 4, dtype=torch.float64))),
        ("hessian", lambda: gram_finish(h.float())),
    ]:
        with pytest.raises(ValueError, match=f"^{name}: "):
            call()
