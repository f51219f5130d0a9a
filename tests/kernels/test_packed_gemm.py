"""Products of many rows with packed weights against float64, on every path, for all widths, ragged groups, columns and rows, and unaligned memory."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dither.kernels import PackedMatrix, dequantize_affine, packed_matmul
from dither.kernels.extension import extension
from kernels.test_packed_matmul import WIDTHS, problem, truth

EPSILON = 2.0**-24  # half a unit in the last place of float32, relative
MANY = 9  # the fewest rows that this is for


def check(found: Tensor, packed: Tensor, bits: int, scale: Tensor, zero: Tensor, group: int, x: Tensor) -> None:
    """Right to the rounding of float32 sums, and of y where it is bfloat16: weights are float32 or, beside bfloat16 x, may be rounded to bfloat16."""
    columns = x.shape[1]
    weight = dequantize_affine(packed, bits, scale, zero.to(scale.dtype), group, columns).double()
    wide = x.double()
    error = columns * EPSILON * (wide.abs() @ weight.abs().T)  # as many additions, each half a unit of what there is to add
    expected = wide @ weight.T
    assert found.dtype == x.dtype and found.shape == expected.shape
    if x.dtype == torch.float32:
        assert bool(((found.double() - expected).abs() <= error).all())
        return
    rounded = wide @ weight.bfloat16().double().T
    right = [((found.double() - y).abs() <= error + 2.0**-8 * y.abs()) for y in (expected, rounded)]
    assert bool(right[0].all()) or bool(right[1].all())


@WIDTHS
@pytest.mark.parametrize(
    ("rows", "columns", "group", "tokens"),
    [
        (16, 32, 32, 12),  # one panel, one vector
        (64, 256, 64, 16),
        (65, 576, 64, 13),
        (7, 1100, 32, 9),
        (33, 300, 100, 31),  # groups that end within a vector
        (17, 257, 13, 10),  # several groups a vector; half a pair
        (3, 96, 96, 9),
        (50, 40, 8, 33),
        (1, 1, 1, 9),
        (20, 33, 64, 25),
    ],
)
def test_against_float64(path: str, bits: int, rows: int, columns: int, group: int, tokens: int) -> None:
    _, packed, scale, zero, x = problem(rows, columns, bits, group, tokens)
    for given_ in (x, x.bfloat16()):
        check(packed_matmul(given_, packed, bits, scale, zero, group), packed, bits, scale, zero, group, given_)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "rows", "columns"), [(1025, 40, 160), (100, 576, 1536)])
def test_more_rows_than_go_together_and_real_shapes(path: str, tokens: int, rows: int, columns: int, dtype: torch.dtype) -> None:
    _, packed, scale, zero, x = problem(rows, columns, 4, 64, tokens)
    x = x.to(dtype)
    check(packed_matmul(x, packed, 4, scale, zero, 64), packed, 4, scale, zero, 64, x)


@given(
    bits=st.integers(1, 8),
    rows=st.integers(1, 90),
    columns=st.integers(1, 700),
    group=st.integers(1, 300),
    tokens=st.integers(MANY, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_any_shape(bits: int, rows: int, columns: int, group: int, tokens: int, dtype: torch.dtype, seed: int) -> None:
    _, packed, scale, zero, x = problem(rows, columns, bits, group, tokens, seed=seed)
    x = x.to(dtype)
    check(packed_matmul(x, packed, bits, scale, zero, group), packed, bits, scale, zero, group, x)


@pytest.mark.parametrize("scale", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_scales_of_every_type_and_one_zero_point_for_all(path: str, bits: int, scale: torch.dtype) -> None:
    _, packed, scales, _, x = problem(18, 192, bits, 64, 11, scale)
    scales[0, 0], scales[1, 1] = 2.0**-20 if scale == torch.float16 else 2.0**-100, -scales[1, 1]  # subnormal where it is float16; negative
    middle = float(1 << bits - 1)
    for given_ in (x, x.bfloat16()):
        found = packed_matmul(given_, packed, bits, scales, middle, 64)
        check(found, packed, bits, scales, torch.full_like(scales, middle), 64, given_)


@WIDTHS
def test_bfloat16_weights_are_those_of_dequantize(path: str, bits: int) -> None:
    """A unit row of x picks a column of the weight out, rounded once, to the last bit; without bfloat16 products it is y that is rounded."""
    _, packed, scale, zero, _ = problem(24, 70, bits, 30, 1)
    weight = dequantize_affine(packed, bits, scale, zero, 30, 70, torch.bfloat16)
    assert torch.equal(packed_matmul(torch.eye(70).bfloat16(), packed, bits, scale, zero, 30), weight.T)
    exact = dequantize_affine(packed, bits, scale, zero, 30, 70)
    assert torch.equal(packed_matmul(torch.eye(70), packed, bits, scale, zero, 30), exact.T)


@pytest.mark.parametrize("bits", [2, 4, 5, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_at_odd_addresses_and_at_its_end(path: str, bits: int, dtype: torch.dtype) -> None:
    """Nothing is read beyond codes or x, and nothing written beyond y (the sanitizers see it)."""
    _, packed, scale, zero, x = problem(3, 101, bits, 20, 10)
    x = x.to(dtype)
    for shift in range(1, 4):
        codes = torch.zeros(packed.numel() + shift, dtype=torch.uint8)[shift:].view(packed.shape).copy_(packed)
        moved = torch.zeros(x.numel() + shift, dtype=dtype)[shift:].view(x.shape).copy_(x)
        check(packed_matmul(moved, codes, bits, scale, zero, 20), packed, bits, scale, zero, 20, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_the_same_among_any_others_and_on_any_number_of_threads(path: str, dtype: torch.dtype) -> None:
    if path == "reference":
        pytest.skip("torch's own products depend on the rows beside")
    _, packed, scale, zero, x = problem(70, 576, 4, 64, 700)
    x = x.to(dtype)
    held = PackedMatrix(packed, 4, scale, zero, 64, 576)
    whole = held(x)
    for first, last in ((0, 9), (3, 20), (505, 522), (1, 514), (680, 700)):
        assert torch.equal(held(x[first:last]), whole[first:last])
    for threads in (2, 3, 16):
        torch.set_num_threads(threads)
        assert torch.equal(held(x), whole) and torch.equal(held(x[:100]), whole[:100])


@WIDTHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_rows_agree_with_few(path: str, bits: int, dtype: torch.dtype) -> None:
    """float32: to the rounding of sums and, with AVX512_BF16, that of x to two bfloat16. bfloat16: to that of weights to bfloat16 and of both y."""
    codes, packed, scale, zero, x = problem(40, 600, bits, 64, 12)
    x = x.to(dtype)
    held = PackedMatrix(packed, bits, scale, zero, 64, 600)
    _, size = truth(codes, scale, zero, x, 64)
    few = torch.cat([held(x[:8]), held(x[8:])])
    limit = 2.0**-16 if dtype == torch.float32 else 3 * 2.0**-9
    assert bool(((held(x).double() - few.double()).abs() <= limit * size).all())


def test_nan_stays_in_its_row(path: str) -> None:
    _, packed, scale, zero, x = problem(20, 129, 4, 64, 11)
    x[3, 128] = float("nan")
    for given_ in (x, x.bfloat16()):
        found = packed_matmul(given_, packed, 4, scale, zero, 64)
        assert bool(found[3].isnan().all()) and bool(torch.cat([found[:3], found[4:]]).isfinite().all())


def test_sizes_of_nothing_and_groups_longer_than_a_row(path: str) -> None:
    _, packed, scale, zero, x = problem(5, 64, 4, 64, 10)
    assert torch.equal(packed_matmul(x, packed, 4, scale, zero, 1 << 62), packed_matmul(x, packed, 4, scale, zero, 64))
    nothing = torch.empty(5, 0, dtype=torch.uint8)
    assert torch.equal(packed_matmul(x[:, :0].contiguous(), nothing, 4, scale[:, :0], zero[:, :0], 64), torch.zeros(10, 5))
    assert packed_matmul(x, packed[:0], 4, scale[:0], zero[:0], 64).shape == (10, 0)


def peak() -> int:
    """The most memory that this process has held since `forget`, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) << 10  # type: ignore[index]


def forget() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("the system does not tell how much memory was in use")


def test_no_decoded_weight_is_held() -> None:
    if extension() is None:
        pytest.skip("the C++ extension is not installed")
    _, packed, scale, zero, x = problem(4096, 4160, 4, 64, 16)  # decoded, 33 MiB: more than malloc keeps for later
    held, narrow = PackedMatrix(packed, 4, scale, zero, 64, 4160), x.bfloat16()
    decoded = 2 * 4096 * 4160
    forget()
    before = peak()
    held(narrow)
    assert peak() - before < decoded / 8
    forget()
    before = peak()
    dequantize_affine(packed, 4, scale, zero, 64, 4160, torch.bfloat16)
    assert peak() - before > decoded / 2  # as would have been seen
