"""Exact identities of rounding to nearest, each over 20000 random blocks or a million samples: what every width must give."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dither.formats import Clip, Int, Scheme, channel, group, token
from dither.formats.clip import clip_search

WIDTHS = pytest.mark.parametrize("bits", range(2, 9))


def blocks(size: int = 32) -> Tensor:
    """20000 blocks of Gaussian values, of sizes from 1e-3 to 1e3."""
    draw = torch.Generator().manual_seed(0)
    return torch.randn(20000, size, generator=draw) * torch.logspace(-3, 3, 20000)[:, None]


def scheme(bits: int, sym: str | bool = False) -> Scheme:
    return Int(bits, sym=sym, scale="float32") @ channel()


def rounded(w: Tensor, how: Scheme) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, values, scales."""
    params = how.fit(w)
    codes = how.encode(w, params)
    return codes, how.decode(codes, params), params["scale"]


@WIDTHS
def test_rounding_what_is_rounded_gives_the_same_codes(bits: int) -> None:
    """Asymmetric: the scale is made again from the rounded ends, so values agree to a few units in the last place."""
    w = blocks()
    slack = 2**-21 * w.abs().amax(1, keepdim=True)
    codes, values, scale = rounded(w, scheme(bits))
    again, values_again, _ = rounded(values, scheme(bits))
    assert torch.equal(codes, again)
    assert bool(((values - values_again).abs() <= slack).all())
    assert bool(((w - values).abs() <= scale / 2 + slack).all())
    codes, values, scale = rounded(w, scheme(bits, "restricted"))
    again, values_again, _ = rounded(values, scheme(bits, "restricted"))
    assert torch.equal(codes, again) and torch.equal(values, values_again)
    assert bool(((w - values).abs() <= scale / 2 + slack).all())


@WIDTHS
def test_values_on_a_grid_stay_where_they_are(bits: int) -> None:
    draw = torch.Generator().manual_seed(0)
    n = 2**bits - 1
    codes = torch.randint(0, n + 1, (2000, 24), generator=draw)
    codes[:, 3], codes[:, 17] = 0, n  # both ends are there
    zero = torch.randint(0, n + 1, (2000, 1), generator=draw)
    w = 2.0 ** torch.randint(-12, 12, (2000, 1), generator=draw) * (codes - zero)
    found, values, _ = rounded(w, scheme(bits))
    assert torch.equal(found.long(), codes) and torch.equal(values, w)


@WIDTHS
def test_signs(bits: int) -> None:
    """Asymmetric codes turn round, q -> N - q, except where the zero point lies between two codes (a tie, which rounds to even);
    restricted symmetric values change their sign.
    """
    w = blocks()
    (plain, _, scale), flipped = rounded(w, scheme(bits)), rounded(-w, scheme(bits))[0]
    zero = -w.double().amin(1).clamp(max=0) / scale[:, 0].double()
    tie = ((zero - zero.floor()) - 0.5).abs() < 1e-4
    assert int(tie.sum()) < 20
    assert torch.equal(flipped.long()[~tie], 2**bits - 1 - plain.long()[~tie])
    assert torch.equal(rounded(-w, scheme(bits, "restricted"))[1], -rounded(w, scheme(bits, "restricted"))[1])


OPTIMA = [
    (False, "float", (0.11885, 0.03744, 0.01154)),  # 2^b levels, half of them on each side: Max's uniform quantizers
    (False, "int", (0.14943, 0.04064, 0.011864)),  # -2^(b-1) .. 2^(b-1) - 1
    ("full", "int", (0.14943, 0.04064, 0.011864)),
    ("restricted", "int", (0.19017, 0.04686, 0.012889)),
]


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("sym", "zero", "mse"), OPTIMA, ids=["float", "int", "full", "restricted"])
def test_best_range_of_a_gaussian(sym: str | bool, zero: str, mse: tuple[float, ...], bits: int) -> None:
    """The least mean square error over all ranges, known by numerical integration."""
    x = torch.randn(1, 1, 1_000_000, generator=torch.Generator().manual_seed(0))
    x[..., 0], x[..., 1] = -6, 6  # both ends shrink alike
    fmt = Int(bits, sym=sym, zero=zero, scale="float32")
    best = clip_search(x.clamp(-6, 6), fmt, Clip(p=2, grid=120, shrink=0.9))
    assert float((fmt.quantize(x, best) - x).square().mean()) == pytest.approx(mse[bits - 2], rel=0.02)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_integer_product_is_the_product_of_the_values(bits: int) -> None:
    """``y = s_x s_w (sum q_x q_w - z_w sum q_x - z_x sum q_w + n z_x z_w)``, one bracket a group, exact in integers."""
    draw = torch.Generator().manual_seed(0)
    w, x = torch.randn(24, 96, generator=draw), torch.randn(10, 96, generator=draw) + 0.3
    weights, activations = Int(bits, scale="float32") @ group(32), Int(8, scale="float32") @ token()
    pw, px = weights.fit(w), activations.fit(x)
    qw = weights.encode(w, pw).long().view(24, 3, 32)
    qx = activations.encode(x, px).long().view(10, 3, 32)
    zw, zx = pw["zero_point"].long(), px["zero_point"].long()  # (24, 3), (10, 1)
    bracket = torch.einsum("tgi,ogi->tog", qx, qw) - zw * qx.sum(-1)[:, None]
    bracket += -zx[:, None] * qw.sum(-1) + 32 * zx[:, None] * zw
    y = (px["scale"].double()[:, None] * pw["scale"].double() * bracket).sum(-1)
    expected = activations.quantize(x, px).double() @ weights.quantize(w, pw).double().T
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
