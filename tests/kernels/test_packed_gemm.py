"""Products of many rows with packed weights against float64, on every path, for all widths, ragged groups, columns and rows, and unaligned memory."""

from __future__ import annotations

import ctypes
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dither.kernels import PackedMatrix, cache_bytes, dequantize_affine, packed_matmul
from dither.kernels.extension import extension
from kernels.test_packed_matmul import TABLES, WIDTHS, problem, table, truth

EPSILON = 2.0**-24  # half a unit in the last place of float32, relative
MANY = 9  # the fewest rows that this is for


def check(
    found: Tensor, packed: Tensor, bits: int, scale: Tensor, zero: Tensor, group: int, x: Tensor, values: Tensor | None = None
) -> None:
    """Right to the rounding of float32 sums, and of y where it is bfloat16: weights are float32 or, beside bfloat16 x, may be rounded to bfloat16."""
    columns = x.shape[1]
    weight = dequantize_affine(packed, bits, scale, zero.to(scale.dtype), group, columns, values=values).double()
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
@pytest.mark.parametrize(("tokens", "rows", "columns"), [(1100, 40, 4200), (700, 40, 160), (100, 576, 1536)])
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
@TABLES
@pytest.mark.parametrize(("columns", "group"), [(576, 64), (300, 100), (257, 13), (40, 8)])
def test_codes_that_name_values(path: str, bits: int, kind: str, columns: int, group: int) -> None:
    _, packed, scale, zero, x = problem(19, columns, bits, group, 12)
    values = table(kind, bits)
    for given_ in (x, x.bfloat16()):
        for z in (zero, torch.zeros_like(zero)):
            found = packed_matmul(given_, packed, bits, scale, z if z is zero else 0.0, group, values=values)
            check(found, packed, bits, scale, z, group, given_, values)


@pytest.mark.parametrize("scale", [torch.float8_e8m0fnu, torch.float8_e4m3fn])
@pytest.mark.parametrize("bits", [4, 8])
def test_scales_of_one_byte_and_one_of_the_tensor(path: str, bits: int, scale: torch.dtype) -> None:
    _, packed, scales, _, x = problem(18, 192, bits, 16, 11, torch.float32)
    scales = (30 * scales).to(scale)
    whole = scales.float() * 0.375
    for given_ in (x, x.bfloat16()):
        found = packed_matmul(given_, packed, bits, scales, 0.0, 16, values=table("signed", bits), tensor_scale=0.375)
        check(found, packed, bits, whole, torch.zeros_like(whole), 16, given_, table("signed", bits))
    index, held = torch.tensor([3, 0, 3]), PackedMatrix(packed, bits, scales, 0.0, 16, 192, values=table("signed", bits), tensor_scale=0.375)
    expected = dequantize_affine(packed, bits, whole, torch.zeros_like(whole), 16, 192, values=table("signed", bits))
    assert torch.equal(held.rows(index, torch.float32), expected[index])


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


WAYS = {"widened": 1, "pairs": 2, "emulated": 3}  # of bfloat16, as csrc/packed_gemm.hpp numbers them


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    """What this processor would not choose by itself; skips the test where it has no such way."""
    native = extension()
    if native is None:
        pytest.skip("the C++ extension is not installed")
    if request.param == "pairs" and not native.has_avx512_bf16():
        pytest.skip("this processor has no AVX512_BF16")
    return str(request.param)


def product(way: str, x: Tensor, held: PackedMatrix) -> Tensor:
    native, y = extension(), torch.empty(x.shape[0], held.packed.shape[0], dtype=x.dtype)
    assert native is not None
    caches = cache_bytes(1), cache_bytes(2)
    native.packed_gemm(*held._weights, x.data_ptr(), len(x), True, y.data_ptr(), *caches, WAYS[way], "", torch.get_num_threads())
    return y


@WIDTHS
@pytest.mark.parametrize(
    ("rows", "columns", "group", "tokens"),
    [(16, 32, 32, 16), (65, 576, 64, 13), (33, 300, 100, 32), (17, 257, 13, 47), (50, 40, 8, 33), (1, 1, 1, 9), (70, 900, 64, 100)],
)
def test_ways_that_other_processors_take(way: str, bits: int, rows: int, columns: int, group: int, tokens: int) -> None:
    """AVX-512 without bfloat16 products, without VBMI, and AMX as its manual describes it, in plain C++."""
    _, packed, scale, zero, x = problem(rows, columns, bits, group, tokens)
    x = x.bfloat16()
    check(product(way, x, PackedMatrix(packed, bits, scale, zero, group, columns)), packed, bits, scale, zero, group, x)


def test_on_other_ways_too_a_row_is_the_same_among_any_others(way: str) -> None:
    _, packed, scale, zero, x = problem(70, 576, 4, 64, 60)
    x, held = x.bfloat16(), PackedMatrix(packed, 4, scale, zero, 64, 576)
    whole = product(way, x, held)
    for first, last in ((0, 9), (3, 20), (9, 41), (59, 60)):
        assert torch.equal(product(way, x[first:last], held), whole[first:last])
    torch.set_num_threads(3)
    assert torch.equal(product(way, x, held), whole)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_panels_are_the_same_with_and_without_vbmi(bits: int) -> None:
    native = extension()
    if native is None or not native.has_avx512_bf16():
        pytest.skip("this processor has no AVX512_BF16")
    _, packed, scale, zero, x = problem(40, 300, bits, 50, 20)
    x, held = x.bfloat16(), PackedMatrix(packed, bits, scale, zero, 50, 300)
    if native.has_amx_bf16():
        pytest.skip("with AMX sums are in another order")
    assert torch.equal(product("pairs", x, held), held(x))


def test_amx_finds_its_configurations_in_memory() -> None:
    """ldtilecfg reads 64 bytes, of which compilers know eight: they must lie among constants, complete, and not be built on the stack before it."""
    native = extension()
    objdump = shutil.which("objdump")
    if native is None or objdump is None or platform.machine() != "x86_64":
        pytest.skip("no extension for x86-64, or no objdump")

    def dump(*options: str) -> str:
        return subprocess.run([objdump, *options, native.__file__], capture_output=True, text=True, check=True).stdout

    code = dump("-d", "--no-show-raw-insn").splitlines()
    for name in ("tileloadd", "tdpbf16ps", "tdpbsud", "tilestored", "tilerelease"):
        assert any(name in line for line in code)
    places = [i for i, line in enumerate(code) if "ldtilecfg" in line]
    assert places
    for place in places:
        if alone := re.search(r"ldtilecfg\s+0x\w+\(%rip\)\s+# ([0-9a-f]+)", code[place]):  # of two full tiles of tokens
            address, counts = int(alone[1], 16) - 32 * 64, range(32, 33)
        else:
            base = re.search(r"ldtilecfg\s+\(%(\w+),%\w+,1\)", code[place])
            assert base is not None, code[place]
            loads = [line for line in code[place - 40 : place] if re.search(rf"lea\s+.*%{base[1]}\b", line)]
            address, counts = int(re.search(r"# ([0-9a-f]+)", loads[-1])[1], 16), range(1, 33)  # type: ignore[index]
        constants = dump("-s", f"--start-address={address + 64 * counts[0]}", f"--stop-address={address + 33 * 64}")
        rows = re.findall(r"^ [0-9a-f]+ ((?:[0-9a-f]+ ){1,4})", constants, re.MULTILINE)
        table = bytes.fromhex("".join(rows).replace(" ", ""))
        for i, count in enumerate(counts):
            config = table[64 * i : 64 * (i + 1)]
            first, second = min(count, 16), count - 16 if count > 16 else 16
            assert config[:16] == bytes([1]) + bytes(15)
            assert config[16:48] == bytes([64, 0] * 8) + bytes(16)
            assert config[48:] == bytes([first, first, second, second, first, second, 16, 16]) + bytes(8)


def peak() -> int:
    """The most memory that this process has held since `forget`, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) << 10  # type: ignore[index]


def forget() -> None:
    """What was freed goes back to the system, and the most is what there is now."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError):
        pytest.skip("the system does not tell how much memory was in use")


def test_no_decoded_weight_is_held() -> None:
    if extension() is None:
        pytest.skip("the C++ extension is not installed")
    _, packed, scale, zero, x = problem(4096, 4160, 4, 64, 16)
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
