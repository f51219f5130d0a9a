"""GPTQ where the Hessian has no factor: the damping grows until it has one and is reported; after the last try the layer is rounded to nearest."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import dither
from dither.formats import Int, channel
from dither.quant.recipes import GPTQ
from dither.quant.rounding.columns import Columns
from dither.quant.rounding.nearest import nearest
from dither.quant.statistics import HESSIAN, Statistics

SCHEME = Int(3) @ channel()


def indefinite(least: float, size: int = 24) -> Tensor:
    """A symmetric matrix whose diagonal has the mean 1 and whose least eigenvalue is ``least`` < 0."""
    draw = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(size, size, generator=draw, dtype=torch.float64)).Q
    values = torch.full((size,), (size - least) / (size - 1), dtype=torch.float64)
    values[0] = least
    return (basis * values) @ basis.T


def weight(size: int = 24) -> Tensor:
    return torch.randn(16, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("least", "damp"), [(0.5, 0.01), (-0.05, 0.1), (-0.5, 1.0), (-5.0, 10.0), (-50.0, 100.0)])
def test_damping_grows_tenfold_until_it_holds(least: float, damp: float) -> None:
    """Added to the diagonal, it has to outweigh the least eigenvalue."""
    h, w = indefinite(least), weight()
    rounded = Columns().solve(w, h, SCHEME)
    assert rounded.damp == pytest.approx(damp) and rounded.fallback is None
    d = w.double() - rounded.tensor.dequantize().double()
    damped = h + damp * h.diagonal().mean() * torch.eye(24)
    assert 2 * (rounded.loss or 0) == pytest.approx(float(((d @ damped) * d).sum()), rel=1e-3)


def seen(h: Tensor) -> Statistics:
    """Statistics of 100 tokens whose Hessian is ``h``, whatever they were."""
    found = Statistics(len(h), frozenset({HESSIAN}))
    found.update(torch.randn(100, len(h)))
    found.hessian.copy_(h)
    return found


def test_after_the_last_try_the_layer_is_rounded_to_nearest_and_says_so() -> None:
    w = weight()
    rounded = Columns().round(w, SCHEME, SCHEME.fit(w), seen(indefinite(-500.0)))
    assert rounded.fallback is not None and "no Cholesky factor" in rounded.fallback
    assert torch.equal(rounded.tensor.codes, nearest(w, SCHEME).codes)
    assert Columns().round(w, SCHEME, SCHEME.fit(w), seen(indefinite(0.5))).fallback is None


def test_the_report_has_the_damping_of_each_layer() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))
    few = [{"input": torch.randn(40, 32)}]
    rows = dither.quantize(net, GPTQ(bits=4, group=16, damp=0.03), few).report.layers
    assert [row.damp for row in rows] == [0.03, 0.03] and [row.fallback for row in rows] == [None, None]
    rows = dither.quantize(net, GPTQ(bits=4, group=16), [{"input": torch.randn(8, 32)}]).report.layers
    assert all(row.fallback == "rounded to nearest: 8 calibration tokens" for row in rows)
