"""Rounding to min-max grids in one pass: every path gives the bits of fit, encode and decode."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from dither.formats import Clip, Float, Int, Scheme, channel, group, tensor, tile
from dither.formats.blocks import token
from dither.kernels import round_affine, round_to_one_grid
from kernels.problems import unaligned

SCALES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
WIDTHS = (*range(1, 34), 47, 48, 49, 63, 64, 65, 128, 130)
GROUPS = (1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33, 64)


def same(found: Tensor, expected: Tensor) -> bool:
    """To the last bit: the sign of a zero counts."""
    return found.dtype == expected.dtype and torch.equal(found.view(torch.int32), expected.view(torch.int32))


def step_by_step(w: Tensor, bits: int, size: int, scale: str = "float16") -> Tensor:
    scheme = Int(bits, scale=scale) @ group(size)
    params = scheme.fit(w)
    values = scheme.quantize(w, params)
    assert same(values, scheme.decode(scheme.encode(w, params), params))
    return values


def drawn(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Rows of many sizes; some have one sign only, some entries are zero."""
    g = torch.Generator().manual_seed(seed + columns)
    w = torch.randn(rows, columns, generator=g) * torch.logspace(-3, 3, rows)[:, None]
    w[torch.rand(rows, columns, generator=g) < 0.1] = 0.0
    w[1::4] = w[1::4].abs()
    w[2::4] = -w[2::4].abs()
    return w


@functools.cache
def every_width_and_group(bits: int, scale: str) -> list[tuple[Tensor, int, Tensor]]:
    """Weights, size of groups, values; made once for all paths."""
    found = []
    for columns in WIDTHS:
        w = unaligned(drawn(5, columns))
        sizes = {g for g in GROUPS if g < columns} | {columns, columns + 3}
        found += [(w, size, step_by_step(w, bits, size, scale)) for size in sizes]
    return found


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width_and_group(path: str, bits: int, scale: str) -> None:
    for w, size, expected in every_width_and_group(bits, scale):
        assert same(round_affine(w, bits, size, SCALES[scale]), expected), (w.shape, size)


@pytest.mark.parametrize("shape", [(1536, 576), (576, 1536), (576, 576), (192, 576), (3, 4096)])
def test_shapes_of_models(path: str, shape: tuple[int, int]) -> None:
    w = drawn(*shape) * 0.02
    for bits, size in ((4, 64), (3, 128), (2, 100), (8, shape[1])):
        assert same(round_affine(w, bits, size), step_by_step(w, bits, size))


ODD: dict[str, Any] = {
    "zeros": [0.0] * 40,
    "negative zeros": [-0.0] * 40,
    "zeros of both signs": [0.0, -0.0] * 20,
    "constant": [3.0] * 40,
    "negative constant": [-0.1] * 40,
    "one": [-2.5],
    "one entry": [0.0] * 39 + [1.0],
    "huge": [1e30, -1e30, 1.0] * 13,
    "largest": [3.4028234663852886e38, -3.4028234663852886e38] * 20,
    "largest, one sign": [3.4028234663852886e38, 1.0, 0.0] * 13,
    "past float16": [1e6, -7e5, 65504.0, 12.0] * 10,
    "denormal": [1e-40, -1e-40, 1e-45, -0.0] * 10,
    "smallest normal": [2.0**-126, -(2.0**-126), 2.0**-149] * 13,
    "small": [1e-8, -3e-8, 2.0**-25, -(2.0**-24)] * 10,
    "wide": [1e30, 1e-30, -1e-45, 5.0] * 10,
    "ties": [k / 2 for k in range(-30, 31)],
}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", ODD)
def test_odd_blocks(path: str, name: str, scale: str) -> None:
    row = torch.tensor(ODD[name])
    w = torch.stack([row, -row, row.flip(0), torch.zeros_like(row)])
    for bits in range(1, 9):
        for size in (1, 3, 8, 16, 20, len(row)):
            found = round_affine(w, bits, size, SCALES[scale])
            assert same(found, step_by_step(w, bits, size, scale)), (bits, size)
            if "zeros" in name:
                assert same(found, torch.zeros_like(w))


@given(
    w=hnp.arrays("float32", st.tuples(st.integers(1, 4), st.integers(1, 40)), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)),
    bits=st.integers(1, 8),
    size=st.integers(1, 45),
    scale=st.sampled_from(sorted(SCALES)),
)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_finite_weights(path: str, w: Any, bits: int, size: int, scale: str) -> None:
    x = torch.from_numpy(w)
    assert same(round_affine(x, bits, size, SCALES[scale]), step_by_step(x, bits, size, scale))


def around(dtype: torch.dtype) -> Tensor:
    """Every positive finite number of a 16-bit type, the float32 halfway to the next, and the float32s beside both."""
    all_bits = torch.arange(1, 2**15, dtype=torch.int16)
    numbers = all_bits.view(dtype).float()
    numbers = numbers[torch.isfinite(numbers)]
    halfway = (numbers[:-1].double() + numbers[1:].double()).div(2).float()
    assert torch.equal(halfway.double(), (numbers[:-1].double() + numbers[1:].double()) / 2)  # exact
    middle = torch.cat([numbers, halfway])
    up, down = torch.tensor(torch.inf), torch.tensor(0.0)
    found = torch.cat([middle, middle.nextafter(up), middle.nextafter(down)])
    return found[torch.isfinite(found)]


@pytest.mark.parametrize("scale", SCALES)
def test_scales_are_rounded_as_torch_rounds(path: str, scale: str) -> None:
    """One weight w > 0 with one bit: its scale is w as stored, and so is its value."""
    beyond = torch.logspace(-45, 38.5, 20001, dtype=torch.float64).float()
    w = torch.cat([around(torch.float16), around(torch.bfloat16), beyond[torch.isfinite(beyond)]])[:, None]
    found = round_affine(w, 1, 1, SCALES[scale])
    assert same(found, step_by_step(w, 1, 1, scale))
    dtype = SCALES[scale]
    inside = (w >= (2.0**-24 if dtype == torch.float16 else 2.0**-126)) & (w <= torch.finfo(dtype).max)
    assert int(inside.sum()) > 100_000
    assert same(found[inside], w[inside].to(dtype).float())


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_matter(path: str, threads: int) -> None:
    w = drawn(37, 130)
    expected = step_by_step(w, 4, 32)
    torch.set_num_threads(threads)
    assert same(round_affine(w, 4, 32), expected)


@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("columns", [1, 5, 16, 37, 64])
def test_refuses_what_is_not_finite(path: str, bad: float, columns: int) -> None:
    """Wherever it stands, with what ``Scheme.fit`` says."""
    for size in (3, 16, columns):
        scheme = Int(4) @ group(size)
        for column in range(columns):
            w = torch.full((6, columns), 0.5)
            w[4, column] = bad
            w[5, 0] = torch.inf
            with pytest.raises(ValueError) as by_fit:
                scheme.fit(w)
            for call in (lambda w=w, size=size: round_affine(w, 4, size), lambda w=w, scheme=scheme: scheme.quantize(w)):
                with pytest.raises(ValueError) as by_kernel:
                    call()
                assert str(by_kernel.value) == str(by_fit.value)
            assert f"at row 4, column {column}" in str(by_fit.value)


def test_finite_sums_that_overflow_are_not_refused(path: str) -> None:
    w = torch.full((2, 64), 3e38)
    assert same(round_affine(w, 4, 64, torch.float32), step_by_step(w, 4, 64, "float32"))


def test_nothing(path: str) -> None:
    for shape in ((0, 8), (3, 0), (0, 0)):
        assert round_affine(torch.zeros(shape), 4, 4).shape == shape
        assert (Int(4) @ group(4)).quantize(torch.zeros(shape)).shape == shape


def test_the_weight_is_left_alone(path: str) -> None:
    w = drawn(4, 50)
    kept = w.clone()
    found = round_affine(w, 3, 16)
    assert same(w, kept) and found.data_ptr() != w.data_ptr()


# -- Scheme.quantize takes it --------------------------------------------------------------------------------------------------------------

ONE_PASS = [
    f @ b
    for f in (Int(4), Int(1), Int(8, scale="bfloat16"), Int(3, scale="float32"))
    for b in (group(16), group(100), channel(), token(), tile(1, 7))
]
STEPS = [
    Int(4, sym="restricted") @ group(16), Int(4, zero="float") @ group(16), Int(4, scale="e4m3") @ group(16), Int(4, scale="e8m0") @ group(16),
    Float(2, 1) @ group(16), Int(4) @ tensor(), Int(4) @ tile(2, 7), (Int(4) @ group(16)).with_clip(Clip()),
]


def count(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every call of the kernel."""
    calls: list[int] = []

    def counted(*arguments: Any) -> Tensor:
        calls.append(1)
        return round_affine(*arguments)

    monkeypatch.setattr("dither.formats.scheme.round_affine", counted)
    return calls


@pytest.mark.parametrize("scheme", [*ONE_PASS, *STEPS], ids=str)
def test_schemes(path: str, scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count(monkeypatch)
    w = drawn(6, 50)
    for x in (w, unaligned(w), w[:1], w[:, 3:20], w[::2], drawn(50, 6).T, w[0].expand(4, 50)):
        assert same(scheme.quantize(x), scheme.quantize(x, scheme.fit(x)))
    assert len(calls) == (7 if scheme in ONE_PASS else 0)


def test_other_matrices_go_step_by_step(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count(monkeypatch)
    scheme = Int(4) @ group(16)
    w = drawn(6, 50)
    for x in (w.double(), w.half(), w.bfloat16()):
        found = scheme.quantize(x)
        assert found.dtype == x.dtype and torch.equal(found, scheme.quantize(x, scheme.fit(x)))
    for wrong in (w[0], w[None], w.int()):
        with pytest.raises(ValueError, match="must be a floating matrix"):
            scheme.quantize(wrong)
    assert not calls


def test_gradients_as_before(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count(monkeypatch)
    scheme = Int(4) @ group(16)
    w = torch.nn.Parameter(drawn(6, 50))
    found = scheme.quantize(w)
    found.sum().backward()
    assert w.grad is not None and bool(w.grad.any()) and not calls
    with torch.no_grad():
        free = scheme.quantize(w)
    assert calls and not free.requires_grad and same(free, found.detach())


def test_wrong_arguments() -> None:
    w = torch.zeros(2, 10)
    for name, call in [
        ("bits", lambda: round_affine(w, 0, 4)),
        ("bits", lambda: round_affine(w, 9, 4)),
        ("group", lambda: round_affine(w, 4, 0)),
        ("scale", lambda: round_affine(w, 4, 4, torch.float64)),
        ("weight", lambda: round_affine(w.double(), 4, 4)),
        ("weight", lambda: round_affine(w[0], 4, 4)),
        ("weight", lambda: round_affine(w.T, 4, 4)),
        ("weight", lambda: round_affine(w.to_sparse(), 4, 4)),
    ]:
        with pytest.raises(ValueError, match=f"^{name}: "):
            call()
    with pytest.raises(TypeError, match=r"^weight: "):
        round_affine([1.0], 4, 4)  # type: ignore[arg-type]


# -- one grid that is given -------------------------------------------------------------------------------------------------------


def on_one_grid(x: Tensor, bits: int, scale: float, zero: float) -> Tensor:
    """By the format, one step after the other."""
    params = {"scale": torch.full((1, 1), scale), "zero_point": torch.full((1, 1), zero)}
    blocked = {k: v for k, v in params.items()}
    return Int(bits).quantize(x.reshape(1, 1, -1), blocked).reshape(x.shape)


@pytest.mark.parametrize("columns", [*range(1, 40), 63, 64, 65, 1000, 4095, 4096, 4097, 10_000])
def test_one_grid_at_every_width(path: str, columns: int) -> None:
    x = unaligned(drawn(3, columns))
    for bits, scale, zero in ((4, 0.3, 7), (1, 2.0, 0), (8, 1e-3, 100), (4, 1 / 15, -75), (6, 0.7, 1234), (2, 1e30, 1)):
        assert same(round_to_one_grid(x, bits, scale, zero), on_one_grid(x, bits, scale, zero)), (bits, scale, zero)


@given(
    x=hnp.arrays("float32", st.tuples(st.integers(1, 3), st.integers(1, 40)), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)),
    bits=st.integers(1, 8),
    scale=st.floats(2.0**-20, 2.0**20, width=32),
    zero=st.one_of(st.integers(-300, 300), st.integers(-(2**23), 2**23)),
)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_one_grid_for_any_finite_values(path: str, x: Any, bits: int, scale: float, zero: int) -> None:
    values = torch.from_numpy(x)
    assert same(round_to_one_grid(values, bits, scale, zero), on_one_grid(values, bits, scale, zero))


def test_one_grid_keeps_nan_and_clips_infinity(path: str) -> None:
    x = torch.tensor([[float("nan"), float("inf"), -float("inf"), 1.0] * 9])
    found = round_to_one_grid(x, 4, 0.5, 3)
    assert bool(found[:, ::4].isnan().all()) and found[0, 1:4].tolist() == [6.0, -1.5, 1.0]


def test_static_schemes_take_it(path: str) -> None:
    """A scheme with one grid for the tensor, as few-bit inputs have it: the same bits as without the kernel."""
    x, params = drawn(7, 33), {"scale": torch.full((1, 1), 0.2), "zero_point": torch.full((1, 1), -3.0)}
    scheme = Int(4) @ tensor()
    assert same(scheme.quantize(x, params), on_one_grid(x, 4, 0.2, -3))
    assert same(scheme.quantize(x.T, params), on_one_grid(x.T.contiguous(), 4, 0.2, -3))
    double = scheme.quantize(x.double(), params)
    assert double.dtype == torch.float64


def test_one_grid_wrong_calls(path: str) -> None:
    x = torch.zeros(2, 3)
    for change in ({"x": x[0]}, {"x": x.double()}, {"bits": 9}, {"scale": 0.0}, {"scale": float("inf")}, {"scale": float("nan")}, {"zero": 0.5}):
        with pytest.raises((ValueError, TypeError), match=next(iter(change))):
            round_to_one_grid(**({"x": x, "bits": 4, "scale": 0.5, "zero": 3.0} | change))  # type: ignore[arg-type]
