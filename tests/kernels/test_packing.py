"""Bit streams and their values: every width, path and ragged end, against Python integers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dither.kernels import dequantize_affine, pack_rows, packed_stride, unpack_rows
from kernels.problems import unaligned

WIDTHS = (1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 576)


def codes_of(rows: int, columns: int, bits: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed + columns)
    return torch.randint(0, 2**bits, (rows, columns), generator=g, dtype=torch.uint8)


def packed_by_integers(row: list[int], bits: int) -> list[int]:
    stream = sum(code << (k * bits) for k, code in enumerate(row))
    return list(stream.to_bytes(packed_stride(len(row), bits), "little"))


@pytest.mark.parametrize("bits", range(1, 9))
def test_layout(path: str, bits: int) -> None:
    for columns in WIDTHS:
        codes = codes_of(3, columns, bits)
        packed = pack_rows(unaligned(codes), bits)
        assert packed.tolist() == [packed_by_integers(row, bits) for row in codes.tolist()]
        assert torch.equal(unpack_rows(unaligned(packed), bits, columns), codes)


@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_round_trip(path: str, data: st.DataObject) -> None:
    bits = data.draw(st.integers(1, 8))
    rows, columns = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 70))
    codes = codes_of(rows, columns, bits, data.draw(st.integers(0, 1000)))
    packed = pack_rows(codes, bits)
    assert packed.shape == (rows, packed_stride(columns, bits))
    assert torch.equal(unpack_rows(packed, bits, columns), codes)


def parameters(rows: int, columns: int, group: int, bits: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(columns)
    groups = -(-columns // group)
    scale = torch.randn(rows, groups, generator=g) * 0.1
    return scale, torch.randint(0, 2**bits, (rows, groups), generator=g).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", range(1, 9))
def test_dequantize_bit_for_bit(path: str, bits: int, dtype: torch.dtype) -> None:
    shapes = [(1, 1), (5, 8), (16, 16), (17, 16), (33, 5), (64, 24), (70, 32), (96, 96), (100, 64)]
    for columns, group in [*shapes, (576, 128), (576, 64)]:
        codes = codes_of(3, columns, bits)
        scale, zero = parameters(3, columns, group, bits)
        index = torch.arange(columns) // group
        expected = (scale[:, index] * (codes.float() - zero[:, index])).to(dtype)
        packed = unaligned(pack_rows(codes, bits))
        found = dequantize_affine(packed, bits, unaligned(scale), unaligned(zero), group, columns, dtype)
        assert found.dtype == dtype
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", range(1, 9))
def test_dequantize_values_of_a_table_bit_for_bit(path: str, bits: int, dtype: torch.dtype) -> None:
    values = torch.randn(1 << bits, generator=torch.Generator().manual_seed(bits))
    for columns, group in [(1, 1), (16, 16), (33, 5), (70, 32), (100, 64), (576, 64)]:
        codes = codes_of(3, columns, bits)
        scale, zero = parameters(3, columns, group, bits)
        index = torch.arange(columns) // group
        expected = (scale[:, index] * (values[codes.long()] - zero[:, index])).to(dtype)
        packed = unaligned(pack_rows(codes, bits))
        assert torch.equal(dequantize_affine(packed, bits, scale, zero, group, columns, dtype, unaligned(values)), expected)


def test_dequantize_takes_half_scales_and_integer_zeros(path: str) -> None:
    codes = codes_of(4, 40, 4)
    scale, zero = parameters(4, 40, 8, 4)
    expected = dequantize_affine(pack_rows(codes, 4), 4, scale.half().float(), zero, 8, 40)
    assert torch.equal(dequantize_affine(pack_rows(codes, 4), 4, scale.half(), zero.to(torch.uint8), 8, 40), expected)


def test_no_rows(path: str) -> None:
    packed, none = torch.zeros(0, 4, dtype=torch.uint8), torch.zeros(0, 1)
    assert dequantize_affine(packed, 4, none, none, 8, 8).shape == (0, 8)


def test_wrong_arguments() -> None:
    codes = codes_of(2, 10, 3)
    packed = pack_rows(codes, 3)
    one = torch.ones(2, 2)
    for name, call in [
        ("bits", lambda: pack_rows(codes, 0)),
        ("bits", lambda: unpack_rows(packed, 9, 10)),
        ("codes", lambda: pack_rows(codes + 8, 3)),
        ("codes", lambda: pack_rows(codes.int(), 3)),
        ("codes", lambda: pack_rows(codes_of(3, 3, 3).T, 3)),
        ("packed", lambda: unpack_rows(packed, 3, 20)),
        ("packed", lambda: unpack_rows(packed.view(torch.int32), 3, 10)),
        ("packed", lambda: dequantize_affine(packed, 4, one, one, 5, 10)),
        ("scale", lambda: dequantize_affine(packed, 3, one[:, :1], one, 5, 10)),
        ("zero", lambda: dequantize_affine(packed, 3, one, one.double(), 5, 10)),
        ("group", lambda: dequantize_affine(packed, 3, one, one, 0, 10)),
        ("values", lambda: dequantize_affine(packed, 3, one, one, 5, 10, values=torch.ones(7))),
        ("dtype", lambda: dequantize_affine(packed, 3, one, one, 5, 10, torch.float16)),
    ]:
        with pytest.raises(ValueError, match=f"^{name}: "):
            call()
