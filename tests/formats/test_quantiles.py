"""Quantiles against torch's, and the search against trying by hand."""

from __future__ import annotations

import pytest
import torch

from dither.formats import Int, Log
from dither.formats.quantiles import PROBABILITIES, free_affine, quantile_ranges, quantile_search, upper_quantiles


@pytest.mark.parametrize("n", [1, 2, 3, 100, 1001, 20_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_quantiles_are_torchs(n: int, dtype: torch.dtype) -> None:
    x = torch.randn(3, n, generator=torch.Generator().manual_seed(n), dtype=dtype)
    probabilities = (0.5, *PROBABILITIES, 1.0)
    expected = torch.quantile(x.double(), torch.tensor(probabilities, dtype=torch.float64), dim=-1).to(dtype)  # in float32 its ranks are off
    for found, wanted in zip(upper_quantiles(x, probabilities), expected, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-7)
    for (lo, hi), p in zip(quantile_ranges(x), PROBABILITIES, strict=True):
        assert torch.allclose(lo, torch.quantile(x.double(), 1 - p, dim=-1).to(dtype), rtol=1e-5, atol=1e-6) and bool((lo <= hi).all())


def test_more_values_than_torch_takes() -> None:
    n = (1 << 24) + 5
    x = torch.arange(n, dtype=torch.float32)
    with pytest.raises(RuntimeError):
        torch.quantile(x, 0.5)
    assert float(upper_quantiles(x, (0.999,))[0]) == pytest.approx(0.999 * (n - 1), rel=1e-6)


def test_a_range_away_from_zero() -> None:
    """Values in [5, 6] at 4 bits: s = 1/15, z = -75, all errors within half a step."""
    params = free_affine(4)(torch.tensor(5.0, dtype=torch.float64), torch.tensor(6.0, dtype=torch.float64))
    assert float(params["scale"]) == pytest.approx(1 / 15) and float(params["zero_point"]) == -75
    x = torch.linspace(5, 6, 1001, dtype=torch.float64)
    assert float((Int(4).quantize(x, params) - x).abs().max()) <= 1 / 30 + 1e-9
    assert int(Int(4).encode(x, params).max()) == 15 and int(Int(4).encode(x, params).min()) == 0


@pytest.mark.parametrize("value", [0.0, 3.5, -2.0])
def test_a_range_of_one_value_keeps_it(value: float) -> None:
    x = torch.full((7,), value)
    assert torch.allclose(Int(4).quantize(x, free_affine(4)(x.amin(), x.amax())), x)


@pytest.mark.parametrize("fmt", [Int(4), Int(3, sym="full"), Int(6, zero="float"), Log(4)], ids=str)
def test_the_search_takes_the_least_error_of_the_three(fmt: Int | Log) -> None:
    x = torch.randn(5, 4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 3
    x = x.abs() if isinstance(fmt, Log) else x
    found = quantile_search(x, fmt)
    error = (fmt.quantize(x, found) - x).square().mean(-1)
    tried = []
    for p in PROBABILITIES:
        ends = torch.stack([torch.quantile(x, 1 - p, dim=-1), torch.quantile(x, p, dim=-1)], -1)
        tried.append((fmt.quantize(x, fmt.fit(ends)) - x).square().mean(-1))
    assert torch.allclose(error, torch.stack(tried).amin(0), rtol=1e-6)


def test_wrong_calls() -> None:
    with pytest.raises(ValueError, match="no values"):
        upper_quantiles(torch.zeros(2, 0), (0.9,))
    with pytest.raises(ValueError, match=r"\(0, 1\]"):
        upper_quantiles(torch.zeros(2, 3), (1.5,))
