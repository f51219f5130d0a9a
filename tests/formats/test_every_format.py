"""One property suite that every number format passes.

Formats come in families: a format is drawn from its family (all widths, all types of scales), blocks are drawn with subnormal, huge, constant,
single and zero values among them, in float32 and float64. The truth is `levels`, each format's definition written out in float64.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from dither.formats import (
    Blocks,
    Float,
    Format,
    Int,
    Log,
    Params,
    QTensor,
    Scheme,
    channel,
    group,
    scheme_from_json,
    tensor,
    tile,
    token,
)
from dither.formats.scales import STORAGE
from dither.formats.scheme import FORMATS

SCALES = ("float16", "bfloat16", "float32", "e8m0", "e4m3")
WIDTHS = range(1, 9)
SIZES = [(e, m) for e in range(1, 8) for m in range(8 - e)]  # eXmY of at most 8 bits
FAMILIES: dict[str, list[Format]] = {
    "asymmetric": [Int(b, scale=s) for b in WIDTHS for s in SCALES],
    "float offset": [Int(b, zero="float", scale=s) for b in WIDTHS for s in SCALES],
    "restricted": [Int(b, sym="restricted", scale=s) for b in WIDTHS[1:] for s in SCALES],  # 1 bit: no level but 0
    "full": [Int(b, sym="full", scale=s) for b in WIDTHS for s in SCALES],
    "extremum": [Int(b, sym="extremum", scale=s) for b in WIDTHS for s in SCALES if s != "e8m0"],  # e8m0 has no sign
    "finite": [Float(e, m, scale=s) for e, m in SIZES if (e, m) != (7, 0) for s in SCALES],
    "without NaN": [Float(e, 7 - e, nan=False, scale=s) for e in range(1, 8) for s in SCALES],
    "infinite": [Float(e, m, finite=False, scale=s) for e, m in SIZES if e > 1 and m > 0 for s in SCALES],
    "logarithmic": [
        Log(b, k, zero, s) for b in WIDTHS for k in (1, 2, 3) if (b, k) != (8, 1)  # float32 holds no 2^-255
        for zero in ("extra", "last") for s in SCALES if s != "e4m3"
    ],
}
EVERY = pytest.mark.parametrize("family", FAMILIES)
STORED = [f for family in FAMILIES.values() for f in family if f.bits <= 8]

numbers = st.one_of(
    st.floats(-1e4, 1e4, width=32),
    st.floats(-2.0**100, 2.0**100, width=32),  # from subnormal to 1e30
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, -1e-40, 2.0**-126, 6e-8, 65504.0, 1e30, -1e30]).map(np.float32),
)
unit = st.floats(-1, 1, width=32).map(lambda v: 0.0 if abs(v) < 1e-3 else v)
shapes = st.tuples(st.integers(1, 3), st.integers(1, 12))  # blocks and their size


def blocks(elements: st.SearchStrategy[float]) -> st.SearchStrategy[Tensor]:
    """Several blocks ``[B, n]``, mixed or constant, float32 or float64."""
    mixed, constant = hnp.arrays(np.float32, shapes, elements=elements), st.builds(lambda v, s: np.full(s, v, np.float32), elements, shapes)
    return st.builds(lambda x, dtype: torch.from_numpy(x).to(dtype), mixed | constant, st.sampled_from([torch.float32, torch.float64]))


def draw(data: st.DataObject, family: str, elements: st.SearchStrategy[float] = numbers) -> tuple[Format, Tensor]:
    return data.draw(st.sampled_from(FAMILIES[family])), data.draw(blocks(elements))


def scale_of(params: Params) -> Tensor:
    """The scale that codes are multiplied with, ``[B, 1]`` float64 (a product of two is rounded to their type)."""
    return (params["scale"] * params["global_scale"] if "global_scale" in params else params["scale"]).double()[:, None]


def levels(fmt: Format, params: Params) -> tuple[Tensor, Tensor]:
    """The codes that the format uses, and what each means, ``[B, codes]`` float64: the definitions of `Int`, `Float` and `Log`."""
    s = scale_of(params)
    if isinstance(fmt, Int):
        codes = torch.arange(fmt.sym == "restricted", 2**fmt.bits)
        if fmt.sym:
            return codes, s * (codes - 2 ** (fmt.bits - 1))
        if fmt.zero == "float":
            return codes, s * codes + params["offset"].double()[:, None]
        return codes, s * (codes - params["zero_point"].double()[:, None])
    if isinstance(fmt, Log):
        codes = torch.arange(2**fmt.exponent + (fmt.zero == "extra"))
        powers = [2 ** (-q / fmt.root) for q in codes.tolist()[:-1]]
        return codes, s * torch.tensor([*powers, 0.0], dtype=torch.float64)
    assert isinstance(fmt, Float)
    codes, values = table(fmt)
    return codes, s * values


@lru_cache(None)
def table(fmt: Float) -> tuple[Tensor, Tensor]:
    """Codes and values of a float format, from sign, exponent and mantissa of every code."""
    bias, ones, found = 2 ** (fmt.exponent - 1) - 1, 2**fmt.exponent - 1, {}
    for code in range(2**fmt.bits):
        e, m = code >> fmt.mantissa & ones, code % 2**fmt.mantissa
        special = e == ones and (not fmt.finite or (fmt.bits == 8 and fmt.nan and m == 2**fmt.mantissa - 1))
        if not special:
            size = math.ldexp(1 + m / 2**fmt.mantissa, e - bias) if e else math.ldexp(m / 2**fmt.mantissa, 1 - bias)
            found[code] = -size if code >> (fmt.bits - 1) else size
    return torch.tensor([*found]), torch.tensor([*found.values()], dtype=torch.float64)


def place(fmt: Format, values: Tensor, params: Params) -> Tensor:
    """Where values lie on the axis on which the format takes the nearest: themselves, but logarithms for `Log`, 0 one step below the last power."""
    if not isinstance(fmt, Log):
        return values.double()
    last = 2**fmt.exponent - (fmt.zero == "last")
    return (fmt.root * (values.double() / scale_of(params)).clamp(min=0).log2()).clamp(-last, 0)


def reach(fmt: Format) -> float:
    """The size of values whose scale is about 1."""
    return fmt.code_max if isinstance(fmt, Int) else fmt.largest if isinstance(fmt, Float) else 1


def regular(fmt: Format, params: Params) -> Tensor:
    """``[B, 1]``: whether a block's stored parameters keep all their digits, a factor of 16 away from the limits of their types."""
    good = torch.ones_like(params["scale"], dtype=torch.bool)
    for key, kind in (("scale", STORAGE[fmt.scale]), ("offset", torch.float16)):  # type: ignore[attr-defined]
        low, high = (2.0**-126, 2.0**127) if kind == torch.float8_e8m0fnu else (torch.finfo(kind).tiny, torch.finfo(kind).max)
        p = params.get(key, torch.zeros(())).abs()
        good = good & ((p > 16 * low) & (p < high / 16) | (p == 0))
    return good[:, None]


def drawn(examples: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A property of every family, on so many drawn blocks."""

    def wrap(test: Callable[..., None]) -> Callable[..., None]:
        return EVERY(settings(max_examples=examples, deadline=None)(given(data=st.data())(test)))  # type: ignore[no-any-return]

    return wrap


def test_every_kind_is_here() -> None:
    assert {type(f) for family in FAMILIES.values() for f in family} == set(FORMATS.values())
    assert len(STORED) == len(set(STORED)) == 608


@EVERY
@pytest.mark.parametrize("shape", [(3, 0), (0, 5), (0, 0)], ids=str)
def test_empty_blocks(family: str, shape: tuple[int, int]) -> None:
    """No values, or no blocks: every verb gives shapes that fit, and finite parameters."""
    x = torch.zeros(shape)
    for fmt in FAMILIES[family]:
        params = fmt.fit(x)
        assert all(p.dim() == 0 or p.shape == shape[:1] for p in params.values()) and all(bool(p.isfinite().all()) for p in params.values())
        assert fmt.quantize(x, params).shape == shape
        if fmt.bits <= 8:
            assert fmt.encode(x, params).shape == fmt.decode(fmt.encode(x, params), params).shape == shape


@EVERY
def test_odd_blocks(family: str) -> None:
    """Whatever is finite stays finite, under every format."""
    odd = [[0.0] * 4, [1e-40, -1e-40], [1e30, -1e30, 1.0], [1e30], [3.0] * 5, [-2.5], [65504.0, 1e-6], [-1e30, -1e-45, 0.0]]
    for fmt in FAMILIES[family]:
        for block in odd:
            x = torch.tensor([block])
            y = fmt.quantize(x, fmt.fit(x))
            assert bool(torch.isfinite(y).all()) and (any(block) or not bool(y.any())), (fmt, block)


@drawn(30)
def test_decoding_is_the_definition(family: str, data: st.DataObject) -> None:
    fmt, x = draw(data, family)
    params = fmt.fit(x)
    codes, wanted = levels(fmt, params)
    decoded = fmt.decode(codes.to(torch.uint8 if fmt.bits <= 8 else torch.int32).expand(len(x), -1), params)
    assert decoded.dtype == x.dtype
    slack = 2.0**-22 * (wanted.abs() + params.get("offset", x.new_zeros(len(x))).abs()[:, None]) + 1e-44
    assert bool(((decoded.double() - wanted).abs() <= slack).all())


@drawn(60)
def test_nearest_idempotent_monotone(family: str, data: st.DataObject) -> None:
    fmt, x = draw(data, family)
    params = fmt.fit(x)
    rounded = fmt.quantize(x, params)
    assert rounded.dtype == x.dtype and bool(torch.isfinite(rounded).all())
    codes, values = levels(fmt, params)
    if fmt.bits <= 8:
        encoded = fmt.encode(x, params)
        assert bool(torch.isin(encoded.long(), codes).all()) and torch.equal(fmt.decode(encoded, params), rounded)
    # nearest: no level is closer by more than the rounding of x / s and of s q
    at, grid, got = place(fmt, x, params), place(fmt, values, params), place(fmt, rounded, params)
    best = (at[..., None] - grid[:, None, :]).abs().amin(-1)
    size = torch.maximum(x.abs(), rounded.abs()).double() + params.get("offset", x.new_zeros(len(x))).double().abs()[:, None]
    slack = 2.0**-21 * size + 1e-44 if not isinstance(fmt, Log) else 1e-4
    assert bool(((at - got).abs() <= best + slack).all())
    # idempotent, monotone
    assert torch.equal(fmt.quantize(rounded, params), rounded)
    order = x.argsort(stable=True)
    assert bool((rounded.gather(-1, order).diff() >= 0).all())
    assert not bool(rounded[x.eq(0).all(-1)].any())  # blocks of zeros stay zero


@drawn(30)
def test_the_min_max_grid_spans_its_block(family: str, data: st.DataObject) -> None:
    """No error is larger than the widest gap between levels, but for what the storage of scales and offsets loses at the ends."""
    fmt, x = draw(data, family, unit)
    x = (x.clamp(min=0) if isinstance(fmt, Log) else x) * reach(fmt)
    params = fmt.fit(x)
    gap = levels(fmt, params)[1].sort(-1).values.diff().amax(-1, keepdim=True)
    lost = {"float16": 2**-11, "bfloat16": 2**-9, "e4m3": 2**-4}.get(fmt.scale, 0) + 2**-11 * ("offset" in params)  # type: ignore[attr-defined]
    peak = x.abs().amax(-1, keepdim=True).double() * (1 + ("offset" in params))
    error = (fmt.quantize(x, params) - x).double().abs()
    assert bool(((error <= gap + (lost + 2.0**-20) * peak) | ~regular(fmt, params)).all())


@EVERY
@settings(max_examples=30, deadline=None)
@given(data=st.data(), power=st.integers(-3, 3))
def test_powers_of_two_pass_through(family: str, data: st.DataObject, power: int) -> None:
    fmt, x = draw(data, family, unit)
    x, c = x * reach(fmt), 2.0**power
    params, scaled = fmt.fit(x), fmt.fit(x * c)
    defined = (regular(fmt, params) & regular(fmt, scaled)).expand_as(x)
    assert torch.equal((fmt.quantize(x, params) * c)[defined], fmt.quantize(x * c, scaled)[defined])


@drawn(30)
def test_signs(family: str, data: st.DataObject) -> None:
    """What turning all values round does to the result, where that is defined."""
    fmt, x = draw(data, family)
    params, turned = fmt.fit(x), fmt.fit(-x)
    y, z = fmt.quantize(x, params), fmt.quantize(-x, turned)
    if isinstance(fmt, Log):
        assert not bool(torch.where(x <= 0, y, 0).any())  # negative values become 0
    elif isinstance(fmt, Int) and not fmt.sym:
        if fmt.zero == "int":  # codes turn round with the zero point
            other = params | {"zero_point": fmt.code_max - params["zero_point"]}
            assert torch.equal(fmt.encode(-x, other), fmt.code_max - fmt.encode(x, params))
    elif isinstance(fmt, Int) and fmt.sym == "full":  # the lowest code has no counterpart
        ends = torch.isclose(torch.maximum(y.abs(), z.abs()).double(), 2 ** (fmt.bits - 1) * scale_of(params))
        assert torch.equal(z[~ends], -y[~ends])
    else:
        both = x.amax(-1) == -x.amin(-1) if isinstance(fmt, Int) and fmt.sym == "extremum" else torch.zeros(len(x), dtype=torch.bool)
        assert torch.equal(z[~both], -y[~both])  # of two extremes with both signs, the positive one is taken


cuts = st.one_of(
    st.sampled_from([token(), channel(), tensor()]), st.integers(1, 40).map(group), st.builds(tile, st.integers(1, 5), st.integers(1, 9))
)


@pytest.mark.parametrize("scale", SCALES)
@settings(max_examples=15, deadline=None)
@given(data=st.data(), cut=cuts, rows=st.integers(0, 6), columns=st.integers(0, 50))
def test_bits_are_the_bytes_on_disk(scale: str, data: st.DataObject, cut: Blocks, rows: int, columns: int) -> None:
    fmt = data.draw(st.sampled_from([f for f in STORED if f.scale == scale]))  # type: ignore[attr-defined]
    scheme = fmt @ cut
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    params = scheme.fit(w)
    held = QTensor.from_codes(scheme.encode(w, params), params, scheme)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "t.safetensors")
        held.save(path)
        again, raw = QTensor.load(path), path.read_bytes()
    header = 8 + int.from_bytes(raw[:8], "little")
    assert "qtensor" in json.loads(raw[8:header])["__metadata__"]
    # by hand: rows of whole 32-bit words; blocks and what each stores
    high, wide = (x if y == -1 else y for x, y in ((max(rows, 1), cut.height), (max(columns, 1), cut.width)))
    count = math.ceil(rows / high) * max(math.ceil(columns / wide), 1)
    total = rows * math.ceil(columns * fmt.bits / 32) * 4 + count * STORAGE[scale].itemsize + 4 * (scale == "e4m3")
    if isinstance(fmt, Int) and not fmt.sym:
        total += math.ceil(count * fmt.bits / 8) if fmt.zero == "int" else 2 * count
    assert len(raw) - header == held.nbytes == scheme.nbytes(rows, columns) == total
    assert held.bits == scheme.bits_per_weight(rows, columns) == (8 * total / (rows * columns) if rows * columns else 0)
    # nothing is lost on the way
    assert again.scheme == scheme == scheme_from_json(scheme.to_json()) == Scheme.from_json(scheme.to_json())
    assert torch.equal(again.dequantize(), held.dequantize())
    assert torch.allclose(held.dequantize(), scheme.quantize(w, params), rtol=1e-6, atol=1e-7)
