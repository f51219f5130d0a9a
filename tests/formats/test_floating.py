"""Small floats against the formulas of LLM-FP4 (arXiv 2310.16836), written out in float64 with a real exponent bias."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dither.formats import Float, Int, Scheme, channel, tensor

FOUR = [Float(3, 0), Float(2, 1), Float(1, 2)]
EIGHT = [Float(7 - m, m, nan=False) for m in range(2, 7)]
OTHERS = [Float(4, 3), Float(5, 2, finite=False), Float(2, 0), Float(4, 0), Float(1, 0), Float(2, 3), Float(3, 2)]


def q(x: Tensor, exponent: int, mantissa: int, bias: float) -> Tensor:
    """The paper's quantizer: maxval, clip, e, s, round half to even."""
    top = (2 - 2.0**-mantissa) * 2.0 ** (2**exponent - 1 - bias)
    clipped = x.double().clamp(-top, top)
    scaled = clipped.abs() * 2.0**bias
    e = (torch.frexp(scaled)[1] - 1).clamp(min=1)  # floor(log2 |x| + b); frexp gives the exponent of [0.5, 1)
    s = torch.exp2(e.double() - mantissa - bias)
    return torch.round(clipped / s) * s


def grid(fmt: Float, bias: float) -> dict[str, Tensor]:
    b0 = 2 ** (fmt.exponent - 1) - 1
    return {"scale": torch.tensor(2.0 ** (b0 - bias), dtype=torch.float64)}


def places(fmt: Float) -> Tensor:
    """Values, midpoints, their neighbours, and what lies between and beyond; both signs."""
    values = fmt.values()[0]
    middle = (values[1:] + values[:-1]) / 2
    noise = torch.randn(4000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * float(values[-1]) / 2
    near = [torch.nextafter(middle, torch.full_like(middle, side)) for side in (-math.inf, math.inf)]
    return torch.cat([values, middle, *near, noise, torch.tensor([0.0, -0.0, 1e-30, 2 * float(values[-1]), 1e30])])


@pytest.mark.parametrize(
    ("fmt", "table"),
    [(Float(2, 1), [0, 0.5, 1, 1.5, 2, 3, 4, 6]), (Float(1, 2), [k / 2 for k in range(8)]), (Float(3, 0), [0, *(2.0**k for k in range(-2, 5))])],
    ids=str,
)
def test_value_tables_of_four_bits(fmt: Float, table: list[float]) -> None:
    values = fmt.values()[0]
    assert values.tolist() == [-v for v in reversed(table[1:])] + table and len(values) == 15
    assert torch.equal(q(values, fmt.exponent, fmt.mantissa, 2 ** (fmt.exponent - 1) - 1), values)


@pytest.mark.parametrize("fmt", EIGHT, ids=str)
def test_eight_bits_without_nan_use_every_code(fmt: Float) -> None:
    values, codes = fmt.values()
    assert len(values) == 255 and int(codes.max()) == 255
    b0 = 2 ** (fmt.exponent - 1) - 1
    assert fmt.largest == (2 - 2.0**-fmt.mantissa) * 2.0 ** (2**fmt.exponent - 1 - b0)
    with_nan = Float(fmt.exponent, fmt.mantissa)
    assert torch.equal(with_nan.values()[0], values[1:-1])
    assert fmt.to_json()["nan"] is False and "nan" not in with_nan.to_json()
    assert Scheme.from_json((fmt @ channel()).to_json()) == fmt @ channel()


@pytest.mark.parametrize("bias", [0.0, 1.0, 3.37, -2.61])
@pytest.mark.parametrize("fmt", FOUR + EIGHT, ids=str)
def test_a_scale_is_a_real_bias(fmt: Float, bias: float) -> None:
    x = torch.randn(3000, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2.0 ** (fmt.exponent - bias)
    found, wanted = fmt.quantize(x, grid(fmt, bias)), q(x, fmt.exponent, fmt.mantissa, bias)
    torch.testing.assert_close(found, wanted, rtol=1e-14, atol=0)


@pytest.mark.parametrize("fmt", [f for f in FOUR + EIGHT if f.mantissa], ids=str)
def test_ties_are_the_papers(fmt: Float) -> None:
    """Half to even mantissa. (Without a mantissa the paper's round sends 1.5 to 2 always, ours to the even code.)"""
    b0 = 2 ** (fmt.exponent - 1) - 1
    assert torch.equal(fmt.quantize(places(fmt), grid(fmt, b0)), q(places(fmt), fmt.exponent, fmt.mantissa, b0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("fmt", FOUR + EIGHT + OTHERS, ids=str)
def test_nearest_is_what_codes_decode_to(fmt: Float, dtype: torch.dtype) -> None:
    x = places(fmt).to(dtype)
    one = {"scale": torch.ones((), dtype=dtype)}
    found, coded = fmt.nearest(x), fmt.decode(fmt.encode(x, one), one)
    assert torch.equal(found, coded) and torch.equal(torch.signbit(found), torch.signbit(coded))


@pytest.mark.parametrize("fmt", FOUR + EIGHT[:2], ids=str)
def test_nearest_value_by_brute_force(fmt: Float) -> None:
    x = torch.randn(2000, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * fmt.largest / 2
    values = fmt.values()[0]
    assert torch.equal(fmt.nearest(x), values[(x[:, None] - values).abs().argmin(1)])


@pytest.mark.parametrize("fmt", FOUR + EIGHT, ids=str)
def test_idempotent_odd_monotone(fmt: Float) -> None:
    x = places(fmt).sort().values
    once = fmt.nearest(x)
    assert torch.equal(fmt.nearest(once), once)
    assert torch.equal(fmt.nearest(-x), -once)
    assert bool((once.diff() >= 0).all())


@pytest.mark.parametrize("power", [-3, 1, 5])
@pytest.mark.parametrize("fmt", FOUR + EIGHT, ids=str)
def test_a_shifted_bias_is_a_power_of_two(fmt: Float, power: int) -> None:
    """Q(2^k x; b - k) = 2^k Q(x; b), bit for bit."""
    x, bias = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(3)), 1.7
    shifted = {"scale": grid(fmt, bias)["scale"] * 2.0**power}
    assert torch.equal(fmt.quantize(x * 2.0**power, shifted), fmt.quantize(x, grid(fmt, bias)) * 2.0**power)


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_one_exponent_bit_is_the_symmetric_integer(bits: int) -> None:
    w = torch.randn(40, 96, generator=torch.Generator().manual_seed(4))
    fmt = Float(1, bits - 2, scale="float32", nan=False)
    assert len(fmt.values()[0]) == 2 * (2 ** (bits - 1) - 1) + 1
    for blocks in (channel(), tensor()):
        integers = Int(bits, sym="restricted", scale="float32") @ blocks
        torch.testing.assert_close((fmt @ blocks).quantize(w), integers.quantize(w), rtol=2e-7, atol=0)


def test_nan_codes_stay_where_they_belong() -> None:
    with pytest.raises(ValueError, match="nan=False needs finite=True"):
        Float(5, 2, finite=False, nan=False)
    with pytest.raises(ValueError, match="nan=False or fewer bits"):
        Float(7, 0)
    assert Float(7, 0, nan=False).largest == 2.0**64
    assert bool(torch.isnan(Float(2, 1).nearest(torch.tensor([math.nan]))).all())


def test_gradients_reach_the_scale_only() -> None:
    x = torch.randn(6, 8, requires_grad=True)
    scale = torch.full((6,), 0.3, requires_grad=True)
    rounded = Float(2, 1).quantize(x, {"scale": scale})
    rounded.sum().backward()
    assert scale.grad is not None and torch.allclose(scale.grad, (rounded / 0.3).sum(1)) and (x.grad is None or not bool(x.grad.any()))
