"""Products with packed weights against float64, on every path, for all widths, group sizes, ragged groups, row counts and unaligned memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dither.kernels import PackedMatrix, pack_rows, packed_matmul
from dither.kernels.extension import extension

WIDTHS = pytest.mark.parametrize("bits", range(1, 9))


def problem(rows: int, columns: int, bits: int, group: int, tokens: int, scale: torch.dtype = torch.float16, seed: int = 0) -> tuple[Tensor, ...]:
    """codes, packed, scale, zero, x."""
    g = torch.Generator().manual_seed(seed)
    groups = -(-columns // group)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=g, dtype=torch.uint8)
    scales = (torch.rand(rows, groups, generator=g) * 0.1 + 1e-3).to(scale)
    zero = torch.randint(0, 1 << bits, (rows, groups), generator=g, dtype=torch.uint8)
    return codes, pack_rows(codes, bits), scales, zero, torch.randn(tokens, columns, generator=g)


def truth(codes: Tensor, scale: Tensor, zero: Tensor | float, x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """The products in float64, and the sums of the absolute values of what is added up."""
    index = torch.arange(codes.shape[1]) // group
    z = zero.double()[:, index] if isinstance(zero, Tensor) else zero
    s, x = scale.double()[:, index], x.double()
    return x @ (s * (codes.double() - z)).T, x.abs() @ (s.abs() * (codes.double() + z)).T


def check(found: Tensor, expected: Tensor, size: Tensor, exact: bool) -> None:
    limit = 2.0**-17 if exact else 2.0**-8  # x as two bfloat16; y rounded to bfloat16
    assert found.shape == expected.shape
    assert bool(((found.double() - expected).abs() <= limit * size + 1e-30).all())


@WIDTHS
@pytest.mark.parametrize(
    ("columns", "group"), [(576, 64), (1536, 64), (128, 128), (1100, 32), (300, 100), (257, 13), (96, 96), (40, 8), (1, 1), (33, 64)]
)
@pytest.mark.parametrize("tokens", [1, 3, 4, 8])
def test_against_float64(path: str, bits: int, columns: int, group: int, tokens: int) -> None:
    codes, packed, scale, zero, x = problem(7, columns, bits, group, tokens)
    expected, size = truth(codes, scale, zero, x, group)
    check(packed_matmul(x, packed, bits, scale, zero, group), expected, size, exact=True)
    narrow = x.bfloat16()
    expected, size = truth(codes, scale, zero, narrow, group)
    found = packed_matmul(narrow, packed, bits, scale, zero, group)
    assert found.dtype == torch.bfloat16
    check(found, expected, size, exact=False)


@pytest.mark.parametrize("scale", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_scales_of_every_type_and_one_zero_point_for_all(path: str, bits: int, scale: torch.dtype) -> None:
    codes, packed, scales, _, x = problem(5, 192, bits, 64, 2, scale)
    scales[0, 0], scales[1, 1] = 2.0**-20 if scale == torch.float16 else 2.0**-100, -scales[1, 1]  # subnormal where it is float16; negative
    middle = float(1 << bits - 1)
    expected, size = truth(codes, scales, middle, x, 64)
    check(packed_matmul(x, packed, bits, scales, middle, 64), expected, size, exact=True)


@given(
    bits=st.integers(1, 8),
    rows=st.integers(1, 20),
    columns=st.integers(1, 700),
    group=st.integers(1, 300),
    tokens=st.integers(1, 6),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_any_shape(bits: int, rows: int, columns: int, group: int, tokens: int, seed: int) -> None:
    codes, packed, scale, zero, x = problem(rows, columns, bits, group, tokens, seed=seed)
    expected, size = truth(codes, scale, zero, x, group)
    check(packed_matmul(x, packed, bits, scale, zero, group), expected, size, exact=True)


@pytest.mark.parametrize("bits", [2, 4, 5, 8])
def test_codes_at_the_end_of_their_memory(path: str, bits: int) -> None:
    """Rows that start at odd addresses and end where the memory does: nothing is read beyond (the sanitizers see it)."""
    codes, packed, scale, zero, x = problem(3, 100, bits, 20, 1)
    for shift in range(1, 4):
        memory = torch.zeros(packed.numel() + shift, dtype=torch.uint8)
        moved = memory[shift:].view(packed.shape)
        moved.copy_(packed)
        expected, size = truth(codes, scale, zero, x, 20)
        check(packed_matmul(x, moved, bits, scale, zero, 20), expected, size, exact=True)


def table(kind: str, bits: int) -> Tensor:
    """What codes mean: a sign and a bfloat16 magnitude; bfloat16 in no order; float32 that bfloat16 does not hold."""
    g = torch.Generator().manual_seed(bits)
    half = torch.randn(1 << bits - 1, generator=g).abs()
    match kind:
        case "signed":
            return torch.cat([half, -half]).bfloat16().float()
        case "any":
            return torch.randn(1 << bits, generator=g).bfloat16().float()
        case _:
            return torch.randn(1 << bits, generator=g)


TABLES = pytest.mark.parametrize("kind", ["signed", "any", "wide"])


@WIDTHS
@TABLES
@pytest.mark.parametrize(("columns", "group"), [(576, 32), (1100, 32), (300, 100), (257, 13), (96, 16), (40, 8), (1, 1), (130, 200)])
def test_codes_that_name_values(path: str, bits: int, kind: str, columns: int, group: int) -> None:
    codes, packed, scale, _, x = problem(5, columns, bits, group, 3)
    values = table(kind, bits)
    weight = values.double()[codes.long()] * scale.double()[:, torch.arange(columns) // group] * 0.75
    for dtype in (torch.float32, torch.bfloat16):
        given = x.to(dtype)
        found = packed_matmul(given, packed, bits, scale, 0.0, group, values=values, tensor_scale=0.75)
        expected, size = given.double() @ weight.T, given.double().abs() @ weight.abs().T
        check(found, expected, size, exact=dtype == torch.float32)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_tables_with_zero_points(path: str, bits: int) -> None:
    codes, packed, scale, zero, x = problem(5, 192, bits, 32, 2)
    values = table("signed", bits)
    s, z = (p.double()[:, torch.arange(192) // 32] for p in (scale, zero))
    weight = s * (values.double()[codes.long()] - z)
    size = x.double().abs() @ (s * (values.double()[codes.long()].abs() + z)).T
    check(packed_matmul(x, packed, bits, scale, zero, 32, values=values), x.double() @ weight.T, size, exact=True)


@pytest.mark.parametrize("group", [16, 32, 20])
@pytest.mark.parametrize("scale", [torch.float8_e8m0fnu, torch.float8_e4m3fn])
def test_every_scale_of_one_byte(path: str, scale: torch.dtype, group: int) -> None:
    """All finite bytes, subnormal and negative ones too; x is such that each product is a normal float32."""
    count = 255 if scale == torch.float8_e8m0fnu else 256
    every = torch.arange(count, dtype=torch.uint8).view(scale).float()
    every = torch.where(every.isfinite(), every, 1.0)
    scales = every.to(scale)[:, None].repeat(1, 4)
    codes, packed, _, _, x = problem(count, 4 * group, 4, group, 1)
    expected = (x.double() @ (codes.double() * every.double()[:, None]).T)[0]
    size = (x.double().abs() @ (codes.double() * every.double()[:, None]).abs().T)[0]
    for factor in (2.0**20, 1.0):  # 2^-127 is no normal number, nor is 2^127 times a sum one
        found = packed_matmul(x, packed, 4, scales, 0.0, group, tensor_scale=factor)[0]
        fits = (factor * size < 2.0**126) & (factor * every.abs() >= 2.0**-126)
        assert bool(fits.sum() > 200)
        check(found[fits], factor * expected[fits], factor * size[fits], exact=True)


@TABLES
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_rows_of_tables_know_nothing_of_each_other(path: str, kind: str, bits: int) -> None:
    _, packed, scale, _, x = problem(37, 576, bits, 32, 8)
    held = PackedMatrix(packed, bits, scale, 0.0, 32, 576, values=table(kind, bits))
    every = held(x)
    if path != "reference":  # torch's own products depend on the rows beside
        assert all(torch.equal(held(x[t : t + 1])[0], every[t]) for t in range(8))
        torch.set_num_threads(3)
        assert torch.equal(held(x), every)


def test_threads_and_repetition_change_nothing(path: str) -> None:
    _, packed, scale, zero, x = problem(70, 576, 4, 64, 2)
    first = packed_matmul(x, packed, 4, scale, zero, 64)
    torch.set_num_threads(3)
    assert torch.equal(packed_matmul(x, packed, 4, scale, zero, 64), first)
    held = PackedMatrix(packed, 4, scale, zero, 64, 576)
    assert torch.equal(held(x), first)
    assert path == "reference" or torch.equal(held(x[1:]), first[1:])  # torch's own products depend on the rows beside


def test_nan_stays_in_sight(path: str) -> None:
    _, packed, scale, zero, x = problem(4, 128, 4, 64, 2)
    x[1, 70] = float("nan")
    found = packed_matmul(x, packed, 4, scale, zero, 64)
    assert bool(found[0].isfinite().all()) and bool(found[1].isnan().all())


def test_what_is_refused() -> None:
    _, packed, scale, zero, x = problem(4, 128, 4, 64, 2)
    for wrong, message in (
        ({"x": x[:, :100].clone()}, "packed"),
        ({"x": x.double()}, "x"),
        ({"bits": 9}, "bits"),
        ({"scale": scale[:, :1]}, "scale"),
        ({"zero": zero.float()}, "zero"),
        ({"group": 0}, "group"),
        ({"values": torch.zeros(15)}, "values"),
        ({"values": torch.full((16,), float("nan"))}, "values"),
        ({"x": x.clone().requires_grad_()}, "no gradient"),
    ):
        given_ = {"x": x, "packed": packed, "bits": 4, "scale": scale, "zero": zero, "group": 64} | wrong
        with pytest.raises(ValueError, match=message):
            packed_matmul(**given_)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="x"):
        PackedMatrix(packed, 4, scale, zero, 64, 128)(x[:, ::2])
    assert extension() is None or packed_matmul(x[:0], packed, 4, scale, zero, 64).shape == (0, 4)
