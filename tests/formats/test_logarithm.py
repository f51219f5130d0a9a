"""Logarithmic formats against their closed forms in float64."""

from __future__ import annotations

import math
from decimal import Decimal

import pytest
import torch
from torch import Tensor

from dither.formats import Float, Log, QTensor, Scheme, channel, scheme_from_json, tensor

ALL = pytest.mark.parametrize("root", [1, 2, 3])
BITS = pytest.mark.parametrize("bits", [2, 3, 4, 6, 7])


def ulps(a: Tensor, b: Tensor) -> float:
    """The largest difference in units of the last place of ``b``."""
    return float(((a - b).abs() / (torch.nextafter(b, torch.full_like(b, math.inf)) - b)).max())


@ALL
@BITS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_code_is_its_power_and_the_parity_formula_gives_the_same_number(bits: int, root: int, dtype: torch.dtype) -> None:
    fmt = Log(bits, root=root)
    codes = torch.arange(fmt.levels, dtype=torch.uint8)
    for s in (1.0, 0.7, 3e-3):
        params = {"scale": torch.tensor(s, dtype=dtype)}
        exact = [Decimal(float(params["scale"])) * Decimal(2) ** (Decimal(-q) / root) for q in range(fmt.levels)]  # 28 digits
        closed = torch.tensor([float(x) for x in exact], dtype=torch.float64)
        assert ulps(fmt.decode(codes, params), closed.to(dtype)) <= 1
        multiplier, shift = fmt.as_shifts(codes, params)
        assert ulps(multiplier * torch.exp2(-shift), closed.to(dtype)) <= 1
        assert len(multiplier.unique()) <= root and torch.equal(shift, shift.round())
    assert float(fmt.decode(torch.tensor([fmt.levels], dtype=torch.uint8), {"scale": torch.tensor(0.7)})) == 0


def test_the_papers_parity_formula() -> None:
    """s~(q) = s (1 + (sqrt 2 - 1) (q mod 2)), A_hat = s~(q) 2^(-ceil(q / 2)): equal to s 2^(-q / 2) to 1 ulp for all codes."""
    fmt = Log(4)
    q = torch.arange(16)
    s = torch.tensor(0.83, dtype=torch.float64)
    paper = s * (1 + (math.sqrt(2) - 1) * (q % 2)) * torch.exp2(-(q / 2).ceil())
    assert ulps(fmt.decode(q.to(torch.uint8), {"scale": s}), paper) <= 1
    assert ulps(fmt.as_shifts(q.to(torch.uint8), {"scale": s})[0], s * (1 + (math.sqrt(2) - 1) * (q % 2))) <= 1


@pytest.mark.parametrize("root", [1, 2])
def test_the_largest_relative_error_inside_the_range(root: int) -> None:
    fmt, params = Log(4, root=root), {"scale": torch.tensor(1.0, dtype=torch.float64)}
    x = torch.logspace(math.log2(2 ** (-(fmt.levels - 1) / root)), 0, 400_001, base=2, dtype=torch.float64)
    worst = float(((fmt.quantize(x, params) - x).abs() / x).max())
    assert worst == pytest.approx(2 ** (1 / (2 * root)) - 1, rel=1e-3)
    assert worst == pytest.approx({1: 0.414, 2: 0.189}[root], abs=1e-3)


def test_zero_and_what_lies_outside() -> None:
    fmt, one = Log(4), {"scale": torch.tensor(1.0)}
    x = torch.tensor([0.0, -0.2, 1.0, 1.7, 2**-7.5, 2**-7.75 * 1.001, 2**-7.75 * 0.999, 1e-38])
    assert fmt.quantize(x, one).tolist() == pytest.approx([0, 0, 1, 1, 2**-7.5, 2**-7.5, 0, 0])
    assert fmt.encode(x, one).tolist() == [16, 16, 0, 0, 15, 15, 16, 16]
    assert fmt.quantize(torch.tensor([torch.nan, 0.5]), one).isnan().tolist() == [True, False]
    assert [float(fmt.quantize(torch.tensor([1 / n]), one)) > 0 for n in (215, 216)] == [True, False]  # a uniform row vanishes beyond 215 keys


@ALL
@BITS
@pytest.mark.parametrize("zero", ["extra", "last"])
def test_rounding_is_decoding_and_the_nearest_by_ratio(bits: int, root: int, zero: str) -> None:
    fmt = Log(bits, root=root, zero=zero)
    x = torch.rand(5, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 8
    params = fmt.fit(x)
    codes, y = fmt.encode(x, params), fmt.quantize(x, params)
    assert torch.equal(y, fmt.decode(codes, {k: v.double() for k, v in params.items()}))
    assert torch.equal(fmt.quantize(y, params), y)
    assert int(codes.max()) <= fmt.levels and (fmt.levels >= 1 << fmt.bits) is False
    levels = params["scale"][:, None, None].double() * torch.exp2(-torch.arange(fmt.levels, dtype=torch.float64) / root)
    nearest = (x[..., None] / levels).log2().abs().amin(-1)
    kept = y > 0
    assert torch.allclose((x / y).log2().abs()[kept], nearest[kept], atol=1e-9)
    assert bool((x[~kept] < levels.amin(-1).expand_as(x)[~kept]).all())


def test_attention_times_values_by_two_sums_of_shifted_integers() -> None:
    g = torch.Generator().manual_seed(0)
    a = (6 * torch.randn(6, 50, generator=g, dtype=torch.float64)).softmax(-1)
    v = torch.randint(-7, 8, (50, 9), generator=g).double()
    fmt = Log(4)
    params = {"scale": torch.full((6,), 0.9, dtype=torch.float64)}
    codes = fmt.encode(a, params)
    multiplier, shift = fmt.as_shifts(codes, params)
    sums = torch.zeros(2, 6, 9, dtype=torch.float64)
    for parity in (0, 1):
        chosen = (codes % 2 == parity) & (codes < fmt.levels)
        sums[parity] = torch.where(chosen, torch.exp2(-shift), torch.zeros_like(shift)) @ v  # exact: integers over 2^8
    assert torch.equal(sums * 2**8, (sums * 2**8).round())
    assert torch.allclose(0.9 * (sums[0] + math.sqrt(2) * sums[1]), fmt.quantize(a, params) @ v, atol=1e-12)
    assert torch.allclose(multiplier.unique(), torch.tensor([0.0, 0.9, 0.9 * math.sqrt(2)], dtype=torch.float64))


def test_packed_codes_hold_zero() -> None:
    x = torch.rand(4, 37, generator=torch.Generator().manual_seed(1)) ** 6
    for fmt, bits in ((Log(4, zero="last"), 4), (Log(4), 5), (Log(7), 8)):
        scheme = fmt @ channel()
        params = scheme.fit(x)
        packed = QTensor.from_codes(scheme.encode(x, params), params, scheme)
        assert fmt.bits == bits and torch.equal(packed.dequantize(), scheme.quantize(x, params))
        assert packed.nbytes == 4 * (-(-37 * bits // 32) * 4 + 4)
    with pytest.raises(ValueError, match="9 bits"):
        Log(8).encode(x, Log(8).fit(x))
    assert torch.isfinite(Log(8).quantize(x, Log(8).fit(x))).all()


def test_kernels_see_the_same_values() -> None:
    fmt = Log(3, root=2)
    grid = fmt.column_grid({"scale": torch.tensor([[2.0]])})
    codes = torch.arange(fmt.levels + 1, dtype=torch.uint8)
    assert torch.allclose(grid.decode(codes[None], 0), fmt.decode(codes[None], {"scale": torch.tensor([2.0])}))


def test_names_tell_formats_apart() -> None:
    logs = [Log(4), Log(4, root=1), Log(4, zero="last"), Log(4, scale="float16")]
    every = [*logs, Float(5, 2), Float(5, 2, finite=False), Float(4, 3), Float(4, 3, nan=False)]
    assert len({str(fmt) for fmt in every}) == len(every)


def test_powers_below_float32_are_refused() -> None:
    with pytest.raises(ValueError, match=r"exponent: 256 powers"):
        Log(8, root=1)
    fmt = Log(7, root=1)
    codes = torch.arange(fmt.levels)
    powers = torch.exp2(-codes.float())
    assert bool((powers > 0).all()) and torch.equal(fmt.decode(codes[None], {"scale": torch.ones(1)})[0], powers)


def test_json_and_errors() -> None:
    scheme = Scheme(Log(4, root=1), tensor())
    assert scheme_from_json(scheme.to_json()) == scheme and str(scheme) == "log4 base 2 and 0 tensor"
    for wrong in ({"exponent": 0}, {"exponent": 9}, {"exponent": 4, "root": 0}, {"exponent": 4, "zero": "none"}, {"exponent": 4, "scale": "e4m3"}):
        with pytest.raises(ValueError, match=r"exponent|root|zero|scale"):
            Log(**wrong)  # type: ignore[arg-type]
