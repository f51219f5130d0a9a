"""The column loop: every path against a plain float64 loop written here, on shapes around every vector and panel."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from dither.kernels import AffineGrid, ColumnGrid, OffsetGrid, TableGrid, gptq_columns, gptq_columns_dynamic
from dither.kernels.gptq import gptq_errors
from kernels.problems import affine_grid, factor, hessian, unaligned

E2M1 = torch.tensor([-6.0, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6])
E2M1_CODES = torch.tensor([15, 14, 13, 12, 11, 10, 9, 0, 1, 2, 3, 4, 5, 6, 7], dtype=torch.uint8)


def plain_loop(weight: Tensor, u: Tensor, group: Tensor, grid: ColumnGrid) -> tuple[Tensor, Tensor]:
    """GPTQ without lazy blocks: codes and errors, all of W updated at every column."""
    work, errors = weight.clone(), torch.zeros_like(weight)
    codes = torch.zeros(weight.shape, dtype=torch.uint8)
    for c in range(weight.shape[1]):
        g, w = int(group[c]), work[:, c].clone()
        s = grid.scale[:, g]
        if isinstance(grid, AffineGrid):
            code = torch.clamp(torch.round(w / s) + grid.zero[:, g], 0, grid.code_max)
            value = s * (code - grid.zero[:, g])
        elif isinstance(grid, OffsetGrid):
            code = torch.clamp(torch.round((w - grid.offset[:, g]) / s), 0, grid.code_max)
            value = s * code + grid.offset[:, g]
        else:
            nearest = (w[:, None] / s[:, None] - grid.table).abs().argmin(1)  # random weights: no ties
            code, value = grid.codes[nearest], s * grid.table[nearest]
        codes[:, c] = code.to(torch.uint8)
        errors[:, c] = (w - value) / u[c, c]
        work[:, c + 1 :] -= errors[:, c : c + 1] * u[c, c + 1 :]
    return codes, errors


def problem(rows: int, columns: int, kind: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, ColumnGrid]:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    grid: ColumnGrid
    grid, group = affine_grid(weight, max(1, columns // 8), 4 if kind != "affine8" else 8)
    if kind == "offset":
        grid = OffsetGrid(grid.scale, -grid.scale * grid.zero + 0.013, 15)
    elif kind == "table":
        grid = TableGrid(grid.scale, E2M1.double(), E2M1_CODES)
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(seed))
    return weight, factor(hessian(columns, seed)), group[order].contiguous(), grid


KINDS = ("affine", "affine8", "offset", "table")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("rows", "columns"),
    [(1, 1), (1, 13), (3, 2), (7, 11), (8, 12), (9, 6), (15, 24), (16, 7), (17, 25), (31, 5), (32, 36), (33, 49),
     (65, 31), (70, 130)],
)
def test_matches_plain_loop_in_float64(path: str, rows: int, columns: int, kind: str) -> None:
    weight, u, group, grid = problem(rows, columns, kind, seed=rows + columns)
    codes, errors = plain_loop(weight, u, group, grid)
    found, loss, found_errors = gptq_errors(unaligned(weight), unaligned(u), group, grid)
    assert torch.equal(found, codes)
    torch.testing.assert_close(found_errors, errors, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(loss, errors.square().sum(1) / 2, rtol=1e-9, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_agrees_but_for_near_ties(path: str, kind: str) -> None:
    weight, u, group, grid = problem(96, 192, kind)
    codes, loss = gptq_columns(weight.float(), u.float(), group, grid)
    expected, expected_loss = gptq_columns(weight, u, group, grid)
    # one weight that sits on a tie to within float32 turns the rest of its row another, equally good way
    same_rows = (codes == expected).all(1)
    assert same_rows.float().mean() > 0.85
    torch.testing.assert_close(loss[same_rows], expected_loss[same_rows], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss.sum(), expected_loss.sum(), rtol=2e-2, atol=0)


@pytest.mark.parametrize(("rows", "columns"), [(192, 576), (64, 1536)])
def test_real_shapes(path: str, rows: int, columns: int) -> None:
    weight, u, group, grid = problem(rows, columns, "affine")
    codes, errors = plain_loop(weight[:16], u, group, AffineGrid(grid.scale[:16], grid.zero[:16], 15))  # type: ignore[union-attr]
    found, loss = gptq_columns(weight, u, group, grid)
    assert torch.equal(found[:16], codes)
    torch.testing.assert_close(loss[:16], errors.square().sum(1) / 2, rtol=1e-9, atol=0)


def test_avx2_and_avx512_give_the_same_bits(on) -> None:  # type: ignore[no-untyped-def]
    for kind in KINDS:
        weight, u, group, grid = problem(50, 200, kind)
        results = []
        for isa in ("avx2", "avx512"):
            on(isa)
            results.append(gptq_errors(weight.float(), u.float(), group, grid))
        for a, b in zip(results[0][::2], results[1][::2], strict=True):
            assert torch.equal(a, b)


def test_threads_do_not_change_results(path: str) -> None:
    weight, u, group, grid = problem(200, 96, "affine")
    one = gptq_errors(weight.float(), u.float(), group, grid)
    torch.set_num_threads(3)
    three = gptq_errors(weight.float(), u.float(), group, grid)
    if path == "reference":  # torch's matrix product may split its sums by the number of threads
        assert (one[0] == three[0]).float().mean() > 0.99
    else:
        assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_half_goes_to_even(path: str, dtype: torch.dtype) -> None:
    halves = torch.arange(-9, 10, dtype=dtype)[None] / 2  # -4.5, -4, ..., 4.5 on a grid of step 1
    eye, group, one = torch.eye(19, dtype=dtype), torch.zeros(19, dtype=torch.int64), torch.ones(1, 1, dtype=dtype)
    expected = np.rint(halves.numpy()) + 8  # numpy rounds half to even
    codes, _ = gptq_columns(halves, eye, group, AffineGrid(one, 8 * one, 15))
    assert codes.tolist() == expected.astype(np.uint8).tolist()
    codes, _ = gptq_columns(halves, eye, group, OffsetGrid(one, -8 * one, 15))
    assert codes.tolist() == expected.astype(np.uint8).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_table_rounds_as_ml_dtypes(path: str, dtype: torch.dtype) -> None:
    beside = torch.tensor([0.2500001, 0.2499999, -0.7500001, 1e30, -1e30])
    w = torch.cat([torch.arange(-64, 65) / 8, beside]).to(dtype)[None]
    grid = TableGrid(torch.ones(1, 1, dtype=dtype), E2M1.to(dtype), E2M1_CODES)
    n = w.shape[1]
    codes, _ = gptq_columns(w, torch.eye(n, dtype=dtype), torch.zeros(n, dtype=torch.int64), grid)
    clipped = w.clamp(-6, 6).numpy().astype(np.float64)
    expected = clipped.astype(ml_dtypes.float4_e2m1fn)
    values = grid.decode(codes, torch.zeros(n, dtype=torch.int64))
    assert values.tolist() == expected.astype(np.float64).tolist()
    assert not bool((codes == 8).any())  # minus zero is no entry of the table


def test_table_of_one_and_of_256(path: str) -> None:
    g = torch.Generator().manual_seed(0)
    w = torch.randn(5, 40, generator=g, dtype=torch.float64)
    eye, group, one = torch.eye(40, dtype=w.dtype), torch.zeros(40, dtype=torch.int64), torch.ones(5, 1, dtype=w.dtype)
    single = TableGrid(one, torch.tensor([0.5], dtype=w.dtype), torch.tensor([9], dtype=torch.uint8))
    assert gptq_columns(w, eye, group, single)[0].unique().tolist() == [9]
    table = torch.randn(256, generator=g, dtype=w.dtype).sort().values
    many = TableGrid(one, table, torch.arange(256, dtype=torch.uint8).flip(0).contiguous())
    codes, _ = gptq_columns(w, eye, group, many)
    assert torch.equal(255 - codes.long(), (w[:, :, None] - table).abs().argmin(2))


def test_table_edges_are_exact_where_a_midpoint_is_not_a_float() -> None:
    """In float32 a midpoint can fall between two floats; each must still go to its nearer entry, judged in float64."""
    g = torch.Generator().manual_seed(1)
    table = torch.randn(33, generator=g).sort().values
    grid = TableGrid(torch.ones(1, 1), table, torch.arange(33, dtype=torch.uint8))
    middle = ((table[1:].double() + table[:-1].double()) / 2).float()
    around = torch.stack([torch.nextafter(middle, middle - 1), middle, torch.nextafter(middle, middle + 1)])
    distance = (around.double()[:, :, None] - table.double()).abs()
    found = distance.gather(2, grid.encode(around.reshape(1, -1), 0).view(3, 32, 1).long())[..., 0]
    assert torch.equal(found, distance.min(2).values)


class Int4:
    """A format as the dynamic loop sees it."""

    def column_grid(self, params) -> AffineGrid:  # type: ignore[no-untyped-def]
        return AffineGrid(params["scale"], params["zero_point"], 15)


def fit_int4(columns: Tensor) -> dict[str, Tensor]:
    low, high = columns.amin(1).clamp(max=0), columns.amax(1).clamp(min=0)
    scale = (high - low) / 15
    return {"scale": scale, "zero_point": torch.round(-low / scale)}


@pytest.mark.parametrize("widths", [(1,) * 9, (64, 64, 40), (7, 5, 20, 1), (33,)])
def test_dynamic_groups_see_all_updates(path: str, widths: tuple[int, ...]) -> None:
    columns = sum(widths)
    weight, u, _, _ = problem(21, columns, "affine")
    group = torch.repeat_interleave(torch.arange(len(widths)), torch.tensor(widths))
    codes, loss = gptq_columns_dynamic(weight, u, group, Int4(), fit_int4)

    work, expected, total = weight.clone(), torch.zeros_like(codes), torch.zeros(21, dtype=torch.float64)
    for c in range(columns):
        if c == 0 or group[c] != group[c - 1]:
            grid = Int4().column_grid({k: v[:, None] for k, v in fit_int4(work[:, group == group[c]]).items()})
        expected[:, c] = grid.encode(work[:, c], 0)
        e = (work[:, c] - grid.decode(expected[:, c], 0)) / u[c, c]
        work -= e[:, None] * torch.where(torch.arange(columns) >= c, u[c], 0)
        total += e.square() / 2
    assert torch.equal(codes, expected)
    torch.testing.assert_close(loss, total, rtol=1e-9, atol=0)


@pytest.mark.parametrize(("block", "width"), [(16, 8), (16, 12), (16, 24), (64, 8), (8, 8)])
def test_stale_dynamic_groups_read_what_the_lazy_blocks_before_left(path: str, block: int, width: int) -> None:
    """The paper's loop, written plainly: the matrix lags behind by the updates of the current block, which live in the block's own copy."""
    columns = 72
    weight, u, _, _ = problem(9, columns, "affine")
    group = torch.arange(columns) // width
    codes, loss = gptq_columns_dynamic(weight, u, group, Int4(), fit_int4, block=block, stale=True)
    work, expected, total = weight.clone(), torch.zeros_like(codes), torch.zeros(9, dtype=torch.float64)
    for i1 in range(0, columns, block):
        i2 = min(i1 + block, columns)
        inside, errors = work[:, i1:i2].clone(), torch.zeros(9, i2 - i1, dtype=torch.float64)
        for c in range(i1, i2):
            if c % width == 0:
                grid = Int4().column_grid({k: v[:, None] for k, v in fit_int4(work[:, c : c + width]).items()})
            w = inside[:, c - i1]
            expected[:, c] = grid.encode(w, 0)
            errors[:, c - i1] = (w - grid.decode(expected[:, c], 0)) / u[c, c]
            inside -= errors[:, c - i1, None] * torch.where(torch.arange(i1, i2) >= c, u[c, i1:i2], 0)
            total += errors[:, c - i1].square() / 2
        work[:, i2:] -= errors @ u[i1:i2, i2:]
    assert torch.equal(codes, expected)
    torch.testing.assert_close(loss, total, rtol=1e-9, atol=0)
    fresh = gptq_columns_dynamic(weight, u, group, Int4(), fit_int4, block=block)[0]
    assert torch.equal(codes, fresh) == (block == width)  # only groups that are the blocks see everything


@pytest.mark.parametrize(("rows", "columns"), [(0, 5), (3, 0), (0, 0)])
def test_empty(path: str, rows: int, columns: int) -> None:
    grid = AffineGrid(torch.ones(rows, 1), torch.zeros(rows, 1), 15)
    group = torch.zeros(columns, dtype=torch.int64)
    codes, loss = gptq_columns(torch.zeros(rows, columns), torch.eye(columns), group, grid)
    assert codes.shape == (rows, columns)
    assert loss.tolist() == [0.0] * rows


def test_not_finite_weights_stay_inside_the_grid(path: str) -> None:
    """Callers refuse NaN and inf by name; the loop itself must only not run wild."""
    w = torch.tensor([[float("nan"), 1.0, float("inf"), -1.0, float("-inf"), 2.0]])
    one, group = torch.ones(1, 1), torch.zeros(6, dtype=torch.int64)
    for grid in (OffsetGrid(one, 0 * one, 3), AffineGrid(one, one, 3), TableGrid(one, E2M1, E2M1_CODES)):
        codes, _ = gptq_columns(w, torch.eye(6), group, grid)
        assert codes.shape == (1, 6)


def test_wrong_arguments() -> None:
    w, u, group, grid = problem(4, 6, "affine")
    one = torch.ones(4, 1, dtype=torch.float64)
    cases = [
        ("weight", lambda: gptq_columns(w.half(), u, group, grid)),
        ("weight", lambda: gptq_columns(w[0], u, group, grid)),
        ("weight", lambda: gptq_columns(torch.randn(6, 4, dtype=torch.float64).T, u, group, grid)),
        ("factor", lambda: gptq_columns(w, u.float(), group, grid)),
        ("factor", lambda: gptq_columns(w, u[:5, :5].contiguous(), group, grid)),
        ("factor", lambda: gptq_columns(w, -u, group, grid)),
        ("factor", lambda: gptq_columns(w, u.T, group, grid)),
        ("column_group", lambda: gptq_columns(w, u, group.int(), grid)),
        ("column_group", lambda: gptq_columns(w, u, group + 1, grid)),
        ("column_group", lambda: gptq_columns(w, u, group - 1, grid)),
        ("column_group", lambda: gptq_columns_dynamic(w, u, torch.tensor([0, 1, 0, 1, 2, 2]), Int4(), fit_int4)),
        ("scale", lambda: gptq_columns(w, u, group, AffineGrid(0 * one, one, 15))),
        ("scale", lambda: gptq_columns(w, u, group, AffineGrid(one[:3], one[:3], 15))),
        ("zero", lambda: gptq_columns(w, u, group, AffineGrid(one, one[:, [0, 0]], 15))),
        ("offset", lambda: gptq_columns(w, u, group, OffsetGrid(one, one[:3], 15))),
        ("code_max", lambda: gptq_columns(w, u, group, AffineGrid(one, one, 256))),
        ("code_max", lambda: gptq_columns(w, u, group, OffsetGrid(one, one, 0))),
        ("table", lambda: gptq_columns(w, u, group, TableGrid(one, E2M1.flip(0).double(), E2M1_CODES))),
        ("codes", lambda: gptq_columns(w, u, group, TableGrid(one, E2M1.double(), E2M1_CODES[:3]))),
        ("block", lambda: gptq_columns(w, u, group, grid, block=0)),
    ]
    for name, call in cases:
        with pytest.raises(ValueError, match=f"^{name}: "):
            call()
    with pytest.raises(TypeError, match="weight"):
        gptq_columns(w.numpy(), u, group, grid)  # type: ignore[arg-type]
