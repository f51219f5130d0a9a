"""Products of integers: exact sums against int64, the whole against float64, rounding against `Int`, on every path; and that nothing a row is beside
changes its bits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dither.formats import Int, token
from dither.kernels import MOST_COLUMNS, Int8Matrix, TokenGrid, int8_matmul, pack_rows
from dither.kernels.extension import extension
from dither.quant.inputs import round_rows
from kernels.problems import unaligned

WIDTHS = pytest.mark.parametrize("bits", range(1, 9))
SYMMETRIES = ("restricted", "full", "extremum", False)
SHAPES = ((576, 64), (1536, 128), (128, 16), (1100, 32), (130, 48), (300, 100), (257, 13), (96, 96), (40, 8), (1, 1), (33, 64), (64, 7))


def problem(rows: int, columns: int, bits: int, group: int, tokens: int, scale: torch.dtype = torch.float16, seed: int = 0) -> tuple[Tensor, ...]:
    """codes, packed, scale, zero, x."""
    g = torch.Generator().manual_seed(seed)
    groups = -(-columns // group)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=g, dtype=torch.uint8)
    scales = (torch.rand(rows, groups, generator=g) * 0.1 + 1e-3).to(scale)
    zero = torch.randint(0, 1 << bits, (rows, groups), generator=g, dtype=torch.uint8)
    return codes, pack_rows(codes, bits), scales, zero, torch.randn(tokens, columns, generator=g) + 0.3


def rounded(x: Tensor, grid: TokenGrid) -> Tensor:
    """x_hat in float32, by `dither.formats`."""
    return round_rows(x.float(), Int(grid.bits, sym=grid.sym, scale=str(grid.scale).removeprefix("torch.")) @ token())


def check(found: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | int, x: Tensor, group: int, grid: TokenGrid) -> None:
    """Against float64: one rounding of each group's integer, up to two as it is scaled and added, one each by the step of x and its float32 x_hat."""
    index = torch.arange(codes.shape[1]) // group
    z = zero.double()[:, index] if isinstance(zero, Tensor) else float(zero)
    weight, x_hat = scale.double()[:, index] * (codes.double() - z), rounded(x, grid).double()
    unit = (3 * scale.shape[1] + 3) * 2.0**-24 + (2.0**-8 if x.dtype == torch.bfloat16 else 0)
    limit = unit * (x_hat.abs() @ weight.abs().T) + 1e-30
    assert found.shape == limit.shape and found.dtype == x.dtype
    assert bool(((found.double() - x_hat @ weight.T).abs() <= limit).all())


@WIDTHS
@pytest.mark.parametrize(("columns", "group"), SHAPES)
@pytest.mark.parametrize("tokens", [1, 3, 8, 17])
def test_against_float64(path: str, bits: int, columns: int, group: int, tokens: int) -> None:
    codes, packed, scale, zero, x = problem(37, columns, bits, group, tokens)
    for sym in ("restricted", False):
        grid = TokenGrid(8, sym, torch.float16)
        check(int8_matmul(x, packed, bits, scale, zero, group, grid), codes, scale, zero, x, group, grid)
    narrow = x.bfloat16()
    check(int8_matmul(narrow, packed, bits, scale, 1 << bits - 1, group, grid), codes, scale, 1 << bits - 1, narrow, group, grid)


@given(
    bits=st.integers(1, 8),
    rows=st.integers(1, 70),
    columns=st.integers(1, 700),
    group=st.integers(1, 300),
    tokens=st.integers(1, 20),
    input_bits=st.integers(2, 8),
    sym=st.sampled_from(SYMMETRIES),
    seed=st.integers(0, 99),
)
@settings(max_examples=80, deadline=None)
def test_any_shape(bits: int, rows: int, columns: int, group: int, tokens: int, input_bits: int, sym: str | bool, seed: int) -> None:
    codes, packed, scale, zero, x = problem(rows, columns, bits, group, tokens, seed=seed)
    grid = TokenGrid(input_bits, sym)
    check(int8_matmul(x, packed, bits, scale, zero, group, grid), codes, scale, zero, x, group, grid)


@pytest.mark.parametrize("tokens", [1, 8, 13])
@pytest.mark.parametrize(("columns", "bits"), [(MOST_COLUMNS, 8), (4096, 8), (4099, 7), (4096, 4), (1001, 2)])
def test_sums_are_exact_and_never_saturate(path: str, columns: int, bits: int, tokens: int) -> None:
    """All codes and inputs as large as they can be, of one sign and of both: with scales of 1 a product is the sum, rounded to float32 once."""
    g = torch.Generator().manual_seed(0)
    codes = torch.full((18, columns), (1 << bits) - 1, dtype=torch.uint8)
    codes[9:] = torch.randint(0, 1 << bits, (9, columns), generator=g, dtype=torch.uint8)
    zero = torch.zeros(18, 1, dtype=torch.uint8)
    zero[3:6] = zero[12:] = (1 << bits) - 1
    x = torch.full((tokens, columns), -127.0)
    x[0] *= -1
    x[2:4] = torch.randint(-127, 128, (2, columns), generator=g).float()[: max(tokens - 2, 0)]
    x[:, 0] = 127  # so that every step is 1
    whole = (x.numpy().astype(np.int64) @ (codes.numpy().astype(np.int64) - zero.numpy().astype(np.int64)).T).astype(np.float32)
    ones = torch.ones(18, 1)
    found = int8_matmul(x, pack_rows(codes, bits), bits, ones, zero, columns, TokenGrid())
    assert np.array_equal(found.numpy(), whole)
    x = torch.where(x > 0, 255.0, 0.0)  # the step is 1 and the zero point 0: q takes all of its 256 values' range
    whole = (x.numpy().astype(np.int64) @ (codes.numpy().astype(np.int64) - zero.numpy().astype(np.int64)).T).astype(np.float32)
    assert np.array_equal(int8_matmul(x, pack_rows(codes, bits), bits, ones, zero, columns, TokenGrid(8, False)).numpy(), whole)
    assert np.array_equal(int8_matmul(-x, pack_rows(codes, bits), bits, ones, zero, columns, TokenGrid(8, False)).numpy(), -whole)


@pytest.mark.parametrize("scale", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sym", SYMMETRIES)
@pytest.mark.parametrize("tokens", [8, 11])
def test_rows_are_rounded_as_formats_round_them(path: str, sym: str | bool, scale: torch.dtype, tokens: int) -> None:
    """Times the identity a product is x_hat itself, to the last bit: for rows of every size, of one sign, of zeros, with ties, and subnormal."""
    g = torch.Generator().manual_seed(1)
    for columns in (1, 15, 64, 77):
        x = torch.randn(tokens, columns, generator=g) * torch.logspace(-12, 12, tokens)[:, None]
        x[0], x[1], x[2], x[3] = 0, -x[1].abs(), x[2].abs(), torch.randint(-254, 255, (columns,), generator=g) / 2
        x[4], x[5], x[6] = x[4] * 2.0**-120, x[5].sign() * 3.4e38, x[6].sign() * 2.0**-149
        eye = torch.eye(columns, dtype=torch.uint8)
        for bits in (2, 5, 8):
            grid = TokenGrid(bits, sym, scale)
            for values in (x, x.bfloat16().clamp(-3.3e38, 3.3e38)):
                exact = Int8Matrix(pack_rows(eye, 8), 8, torch.ones(columns, 1), 0, columns, columns, grid)
                assert torch.equal(exact(values.float()), rounded(values, grid))
                assert torch.equal(exact(values), rounded(values, grid).to(values.dtype))


@WIDTHS
@pytest.mark.parametrize(("columns", "group"), [(576, 64), (300, 100), (128, 16), (257, 13), (2000, 2000)])
def test_a_row_has_the_same_bits_in_any_company(path: str, bits: int, columns: int, group: int) -> None:
    if path == "reference":
        pytest.skip("torch's own products depend on the rows beside")
    _, packed, scale, zero, x = problem(81, columns, bits, group, 29)
    for sym in ("restricted", False):
        held = Int8Matrix(packed, bits, scale, zero, group, columns, TokenGrid(8, sym, torch.bfloat16))
        every = held(x)
        for first, last in ((0, 1), (3, 11), (5, 29), (20, 22), (0, 12)):
            assert torch.equal(held(x[first:last]), every[first:last])
        torch.set_num_threads(3)
        assert torch.equal(held(x), every) and torch.equal(held(x[:4]), every[:4])
        torch.set_num_threads(1)


def test_few_outputs_for_many_threads(path: str) -> None:
    """Tokens are shared out too."""
    codes, packed, scale, zero, x = problem(5, 96, 4, 32, 300)
    torch.set_num_threads(4)
    check(int8_matmul(x, packed, 4, scale, zero, 32, TokenGrid()), codes, scale, zero, x, 32, TokenGrid())


def test_groups_that_do_not_stay_in_the_cache_at_once(path: str) -> None:
    codes, packed, scale, zero, x = problem(70, 6000, 3, 500, 9)
    for sym in ("full", False):
        check(int8_matmul(x, packed, 3, scale, zero, 500, TokenGrid(8, sym)), codes, scale, zero, x, 500, TokenGrid(8, sym))


@pytest.mark.parametrize("scale", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [2, 9])
def test_scales_of_every_type(path: str, scale: torch.dtype, tokens: int) -> None:
    codes, packed, scales, zero, x = problem(5, 192, 4, 64, tokens, scale)
    scales[0, 0], scales[1, 1] = 2.0**-20 if scale == torch.float16 else 2.0**-100, -scales[1, 1]  # subnormal where it is float16; negative
    check(int8_matmul(x, packed, 4, scales, zero, 64, TokenGrid()), codes, scales, zero, x, 64, TokenGrid())


@pytest.mark.parametrize("bits", [2, 4, 5, 8])
@pytest.mark.parametrize("tokens", [1, 9])
def test_memory_of_any_alignment(path: str, bits: int, tokens: int) -> None:
    """Rows that start at odd addresses and end where the memory does: nothing is read beyond (the sanitizers see it)."""
    codes, packed, scale, zero, x = problem(3, 100, bits, 20, tokens)
    for values in (x, x.bfloat16()):
        found = int8_matmul(unaligned(values), unaligned(packed), bits, unaligned(scale), unaligned(zero), 20, TokenGrid())
        check(found, codes, scale, zero, values, 20, TokenGrid())


@pytest.mark.parametrize("tokens", [4, 20])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused_and_stays_in_its_row(path: str, bad: float, tokens: int) -> None:
    _, packed, scale, zero, x = problem(4, 128, 4, 64, tokens)
    held = Int8Matrix(packed, 4, scale, zero, 64, 128, TokenGrid(8, False))
    clean = held(x)
    x[1, 70] = bad
    with pytest.raises(ValueError, match=r"x: holds .* at row 1, column 70"):
        held(x)
    y, finite = held.multiply(x)
    assert not finite and bool(y[1].isnan().all()) and torch.equal(y[2:], clean[2:]) and torch.equal(y[0], clean[0])


def test_nothing_to_multiply(path: str) -> None:
    _, packed, scale, zero, x = problem(4, 128, 4, 64, 2)
    assert int8_matmul(x[:0], packed, 4, scale, zero, 64, TokenGrid()).shape == (0, 4)
    empty = torch.zeros(4, 0)
    assert torch.equal(int8_matmul(torch.zeros(3, 0), empty.byte(), 4, empty, 8, 64, TokenGrid()), torch.zeros(3, 4))
    assert int8_matmul(x, packed[:0], 4, scale[:0], zero[:0], 64, TokenGrid()).shape == (2, 0)


def test_what_is_refused() -> None:
    _, packed, scale, zero, x = problem(4, 128, 4, 64, 2)
    for wrong, message in (
        ({"x": x[:, :100].clone()}, "packed"),
        ({"x": x.double()}, "x"),
        ({"bits": 9}, "bits"),
        ({"scale": scale[:, :1]}, "scale"),
        ({"scale": scale.to(torch.float8_e4m3fn)}, "scale"),
        ({"zero": zero.float()}, "zero"),
        ({"zero": 300}, "zero"),
        ({"zero": 7.5}, "zero"),
        ({"group": 0}, "group"),
        ({"x": x.clone().requires_grad_()}, "no gradient"),
    ):
        given_: dict[str, Any] = {"x": x, "packed": packed, "bits": 4, "scale": scale, "zero": zero, "group": 64, "grid": TokenGrid()} | wrong
        with pytest.raises(ValueError, match=message):
            int8_matmul(**given_)
    with pytest.raises(ValueError, match="x"):
        Int8Matrix(packed, 4, scale, zero, 64, 128, TokenGrid())(x[:, ::2])
    with pytest.raises(ValueError, match="group"):
        Int8Matrix(torch.zeros(1, MOST_COLUMNS + 4, dtype=torch.uint8), 8, torch.ones(1, 1), 0, 10**6, MOST_COLUMNS + 1, TokenGrid())
    wrong_grids: tuple[tuple[dict[str, Any], str], ...] = (
        ({"bits": 9}, "bits"), ({"bits": 1}, "bits"), ({"sym": "other"}, "sym"), ({"scale": torch.float64}, "scale"),
    )  # fmt: skip
    for grid, message in wrong_grids:
        with pytest.raises(ValueError, match=message):
            TokenGrid(**grid)


# -- tiles -------------------------------------------------------------------------------------------------------------------

VECTORS, EMULATED = 1, 2  # csrc/int8_matmul.hpp, Int8Way


@pytest.mark.parametrize("sym", ["restricted", False])
@pytest.mark.parametrize("bits", [2, 4, 7, 8])
@pytest.mark.parametrize(
    ("rows", "columns", "group", "tokens"),
    [(64, 128, 64, 32), (70, 576, 64, 47), (33, 300, 100, 16), (1, 257, 13, 33), (130, 40, 8, 70), (65, 2000, 2000, 64), (20, 64, 64, 15)],
)
def test_tiles_give_the_bits_of_vectors(rows: int, columns: int, group: int, tokens: int, bits: int, sym: str | bool) -> None:
    """AMX as its manual describes it, in plain C++: two tiles of tokens, one, and what is left."""
    native = extension()
    if native is None or native.isa("") != "avx512":
        pytest.skip("tiles come with AVX-512")
    _, packed, scale, zero, x = problem(rows, columns, bits, group, tokens)
    held = Int8Matrix(packed, bits, scale, zero, group, columns, TokenGrid(8, sym))
    found = []
    for way in (VECTORS, EMULATED):
        for threads in (1, 2):
            y = torch.full((tokens, rows), math.nan)
            assert native.int8_matmul(*held._weights, x.data_ptr(), tokens, False, y.data_ptr(), way, "", threads)
            found.append(y)
    assert not bool(found[0].isnan().any()) and all(torch.equal(y, found[0]) for y in found)
