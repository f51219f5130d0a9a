"""Learned rounding of one weight: FlexRound's exact identities, AdaRound's, and what `learned` promises."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from dither.formats import Float, Int, QTensor, Scheme, channel, group, tensor, tile
from dither.formats.scales import stored
from dither.quant.rounding.adaround import UpOrDown
from dither.quant.rounding.columns import columns
from dither.quant.rounding.flexround import Divided, Division
from dither.quant.rounding.learned import Learned, learned
from dither.quant.rounding.nearest import nearest
from dither.quant.rounding.soft import Descent, Spread, into_cells

torch.set_num_threads(1)
GRIDS = [
    Int(4) @ tensor(),
    Int(3) @ channel(),
    Int(4) @ group(16),
    Int(3) @ group(20),  # ragged: 48 = 20 + 20 + 8
    Int(4) @ group(64),  # longer than the row
    Int(4) @ tile(5, 20),
    Int(4, sym="full") @ tensor(),
    Int(3, sym="restricted") @ group(16),
    Int(4, sym="extremum") @ group(20),
    Int(4, zero="float") @ group(16),
    Int(4, scale="bfloat16") @ channel(),
    Int(4, scale="e4m3") @ group(16),
    Int(8) @ channel(),
]
FLOATS = [Float(2, 1) @ group(16), Float(2, 1, scale="e4m3") @ group(16), Float(4, 3) @ channel()]


def weight(outputs: int = 24, inputs: int = 48, seed: int = 0) -> Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))


def layer(seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight with outliers, and the Hessian of correlated inputs."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(1024, 48, generator=g) @ (torch.eye(48) + torch.randn(48, 48, generator=g) / 48**0.5)
    w = torch.randn(24, 48, generator=g)
    return torch.where(torch.rand(24, 48, generator=g) < 0.01, 5 * w, w), x.T.double() @ x.double() / 1024


def scrambled(soft: Divided, size: float = 0.2, seed: int = 1) -> Divided:
    """The same soft weight somewhere else than at its start."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in soft.parameters():
            p += size * torch.randn(p.shape, generator=g, dtype=p.dtype)
    return soft


def loss_of(t: QTensor, w: Tensor, h: Tensor) -> float:
    d = t.dequantize().double() - w.double()
    return float(((d @ h) * d).sum())


# -- FlexRound: the checks of its specification ---------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", GRIDS + FLOATS, ids=str)
@pytest.mark.parametrize("rank", [None, 4])
def test_learning_starts_at_nearest_bit_for_bit(scheme: Scheme, rank: int | None) -> None:
    w = weight()
    params = scheme.fit(w)
    soft = Division(rank=rank).start(w, scheme, params)
    assert torch.equal(soft.weight(torch.float32), scheme.decode(scheme.encode(w, params), params))
    codes, kept = soft.finish()
    assert torch.equal(codes, scheme.encode(w, params)) and torch.equal(kept["scale"], params["scale"])


def reference(soft: Divided, w: Tensor, scheme: Scheme) -> tuple[Tensor, list[Tensor]]:
    """``W_hat`` by torch's own operations, rounding passed straight through; and its parameters."""
    params = soft.params
    form = scheme.format
    leaves = [p.detach().clone().requires_grad_() for p in (soft.d1, soft.d2, soft.d3)]  # type: ignore[union-attr]
    d1, d2, d3 = leaves
    rows, cols = scheme.blocks.row_groups(w.shape[0]), scheme.blocks.column_groups(w.shape[1])
    raw = params["scale"] * d1.exp()
    s1 = (raw + (stored(raw, form.scale) - raw).detach())[rows][:, cols]  # type: ignore[attr-defined]
    z = params["zero_point"][rows][:, cols] if "zero_point" in params else torch.full_like(w, float(2 ** (form.bits - 1)))
    r = w / (s1 * d2.exp() * d3.exp())
    n = r + (r.round() - r).detach()
    low = 1.0 if form.sym == "restricted" else 0.0  # type: ignore[attr-defined]
    return s1 * torch.clamp(n, low - z, 2**form.bits - 1 - z), leaves  # passes gradients at the ends


@pytest.mark.parametrize(
    "scheme",
    [
        Int(4, scale="float32") @ tensor(),
        Int(3, scale="float32") @ channel(),
        Int(3, scale="float32") @ group(16),
        Int(3, scale="float32") @ group(20),
        Int(3, scale="float32") @ tile(5, 20),
        Int(3, sym="full", scale="float32") @ group(16),
        Int(3, sym="restricted", scale="float32") @ channel(),
    ],
    ids=str,
)
def test_gradients_are_those_of_autograd(scheme: Scheme) -> None:
    w = weight().double()
    soft = scrambled(Divided(w, scheme, scheme.fit(w)))
    g = torch.randn(w.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mine = soft.weight(torch.float64)
    mine.backward(g)
    other, leaves = reference(soft, w, scheme)
    other.backward(g)
    assert float((mine - other).detach().abs().max()) < 1e-12
    for own, leaf in zip((soft.d1, soft.d2, soft.d3), leaves, strict=True):
        assert own is not None and own.grad is not None and leaf.grad is not None
        assert float((own.grad - leaf.grad).abs().max()) <= 1e-12 * max(1.0, float(leaf.grad.abs().max()))


def test_convolutions_and_low_ranks_follow_the_chain_rule() -> None:
    scheme = Int(3, scale="float32") @ channel()
    w = weight().double()
    g = torch.randn(w.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    full = Divided(w, scheme, scheme.fit(w), kernel=4)
    low = Divided(w, scheme, scheme.fit(w), rank=3)
    assert full.d4 is not None and full.d4.shape == (1, 12) and low.low_rank is not None
    full.weight(torch.float64).backward(g)
    low.weight(torch.float64).backward(g)
    assert full.d2 is not None and full.d2.grad is not None and full.d4.grad is not None
    assert torch.allclose(full.d4.grad.view(-1), full.d2.grad.sum(0).view(12, 4).sum(1), atol=1e-12)
    left, right, columns_ = low.low_rank
    assert left.grad is not None and columns_.grad is not None
    assert torch.allclose(left.grad, full.d2.grad @ right.T.detach(), atol=1e-12)
    assert torch.allclose(columns_.grad.view(-1), full.d2.grad.sum(0), atol=1e-12)


def test_with_the_division_frozen_it_is_lsq() -> None:
    scheme = Int(3, scale="float32") @ channel()
    w = weight().double()
    params = {k: v * (0.6 if k == "scale" else 1) for k, v in scheme.fit(w).items()}  # a grid that clips
    params["scale"] = stored(params["scale"], "float32")
    soft = Divided(w, scheme, params)
    g = torch.randn(w.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    soft.weight(torch.float64).backward(g)
    r, z = w / params["scale"], params["zero_point"]
    n = r.round()
    inside = (n >= -z) & (n <= 7 - z)
    assert 0.01 < float((~inside).double().mean()) < 0.5
    q = torch.minimum(torch.maximum(n, -z), 7 - z)
    lsq = (g * torch.where(inside, q - r, q)).sum(1, keepdim=True)
    assert soft.d1.grad is not None
    assert torch.allclose(soft.d1.grad / params["scale"], lsq, atol=1e-12)


@pytest.mark.parametrize("scheme", GRIDS + FLOATS, ids=str)
def test_what_is_stored_decodes_to_the_trained_weight_bit_for_bit(scheme: Scheme) -> None:
    w = weight()
    soft = scrambled(Divided(w, scheme, scheme.fit(w)))
    trained = soft.weight(torch.float32)
    codes, params = soft.finish()
    assert torch.equal(QTensor.from_codes(codes, params, scheme).dequantize(), trained)
    assert not torch.equal(params["scale"], soft.params["scale"])


def test_gradients_grow_with_the_weight() -> None:
    scheme = Int(8, scale="float32") @ tensor()
    w = weight(200, 400).double()
    soft = Divided(w, scheme, scheme.fit(w))
    g = torch.randn(w.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    soft.weight(torch.float64).backward(g)
    assert soft.d2 is not None and soft.d2.grad is not None  # at S' = 1, dL/dS' is dL/dd2
    edges = torch.linspace(0.1, 2.1, 6)
    slopes = []
    for lo, hi in itertools.pairwise(edges.tolist()):
        here = (w.abs() >= lo) & (w.abs() < hi)
        slopes.append(float(soft.d2.grad[here].abs().mean() / w[here].abs().mean()))
    expected = math.sqrt(2 / math.pi)  # mean |G|
    assert all(abs(slope / expected - 1) < 0.03 for slope in slopes)


def test_zeros_stay_and_signs_never_flip() -> None:
    scheme = Int(4, sym="full") @ channel()
    w = weight()
    w[:, ::7] = 0
    soft = scrambled(Divided(w, scheme, scheme.fit(w)), 1.0)
    assert bool((soft.weight(torch.float32) * w >= 0).all()) and not bool(soft.weight(torch.float32)[:, ::7].any())


# -- AdaRound ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", GRIDS, ids=str)
def test_adaround_starts_at_the_float_weight(scheme: Scheme) -> None:
    w = weight()
    params = scheme.fit(w)
    soft = UpOrDown().start(w, scheme, params)
    spread = soft.spread
    ratio = (spread.view(w) - (0 if soft.levels.offset is None else soft.levels.offset)) / soft.scale
    inside = ((ratio >= soft.levels.lo) & (ratio <= soft.levels.hi)).reshape(w.shape)
    error = ((soft.weight(torch.float32) - w).abs() / spread.out(params["scale"]).abs().max())[inside]
    assert float(inside.float().mean()) > 0.8 and float(error.detach().max()) < 1e-4
    assert torch.allclose(soft.share(), ratio - ratio.floor(), atol=1e-5)
    codes = soft.finish()[0]
    step = (codes.short() - scheme.encode(w, params).short()).abs()
    assert int(step.max()) <= 1 and float((step > 0).float().mean()) < 0.01  # ties only


def test_adarounds_regulariser() -> None:
    scheme = Int(4) @ channel()
    soft = UpOrDown(penalty=2.0, warmup=0.2, beta=(20.0, 2.0)).start(weight(), scheme, scheme.fit(weight()))
    assert soft.regulariser(0.1) is None
    for progress, beta in ((0.2, 20.0), (0.6, 11.0), (1.0, 2.0)):
        found = soft.regulariser(progress)
        assert found is not None
        expected = 2.0 * (1 - (2 * soft.share().double() - 1).abs().pow(beta)).sum().detach()
        assert float(found.detach()) == pytest.approx(float(expected), rel=1e-5)
    assert UpOrDown(penalty=0.0).start(weight(), scheme, scheme.fit(weight())).regulariser(1.0) is None


def test_flexround_moves_further_than_adaround_can() -> None:
    w, h = layer()
    scheme = Int(4) @ tensor()
    flex = learned(w, scheme, hessian=h, steps=300, lr=2e-2)[1]
    ada = learned(w, scheme, hessian=h, steps=300, lr=3e-2, soft=UpOrDown(penalty=3.0))[1]
    assert sum(flex["moved"][2:]) > 0 and sum(ada["moved"][2:]) == 0 and ada["grid_change"] == 0
    assert flex["loss"] < 0.6 * flex["loss0"] and ada["loss"] < 0.95 * ada["loss0"] and flex["loss"] < 0.8 * ada["loss"]


# -- learning ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", [Int(3) @ group(20), Int(4, sym="full") @ tensor(), Float(2, 1) @ group(16)], ids=str)
def test_the_loss_is_that_of_what_is_stored_and_never_above_nearest(scheme: Scheme) -> None:
    w, h = layer(1)
    q, info = learned(w, scheme, hessian=h, steps=40, lr=1e-2)
    assert loss_of(q, w, h) == pytest.approx(info["loss"], rel=1e-4)
    assert loss_of(nearest(w, scheme), w, h) == pytest.approx(info["loss0"], rel=1e-4)
    assert info["loss"] <= info["loss0"] and sum(info["moved"]) == pytest.approx(1)


def test_the_best_is_kept() -> None:
    w, h = layer(2)
    scheme = Int(4) @ channel()
    q, info = learned(w, scheme, hessian=h, steps=30, lr=3.0)
    assert info["loss"] == info["loss0"] and info["step"] == 0 and torch.equal(q.codes, nearest(w, scheme).codes)
    assert learned(w, scheme, hessian=h, steps=30, lr=3.0, keep_best=False)[1]["loss"] > info["loss0"]


def test_a_start_from_gptq() -> None:
    w, h = layer(3)
    scheme = Int(3) @ group(16)
    gptq = columns(w, h, scheme)
    q, info = learned(w, scheme, hessian=h, steps=100, lr=1e-3, start="gptq")
    assert loss_of(q, w, h) <= loss_of(gptq, w, h) < info["loss0"]
    params = scheme.fit(w)
    base = into_cells(w, gptq.codes, scheme, params)
    assert torch.equal(scheme.encode(base, params), gptq.codes)
    same = scheme.encode(w, params) == gptq.codes
    assert torch.equal(base[same], w[same]) and 0.1 < float(same.float().mean()) < 0.9


def test_the_same_bytes_every_time() -> None:
    w, h = layer(4)
    for soft in (Division(), Division(rank=2), UpOrDown()):
        a, b = (learned(w, Int(3) @ group(16), hessian=h, steps=20, lr=1e-2, soft=soft)[0] for _ in range(2))
        assert all(torch.equal(a.stored[k], b.stored[k]) for k in a.stored)


def test_adam_is_under_a_cosine() -> None:
    p = torch.zeros(1, requires_grad=True)
    descent, seen = Descent([p], 0.1, 4), []
    for _ in range(4):
        before = float(p.detach())
        p.grad = torch.ones(1)
        descent.step()
        seen.append(before - float(p.detach()))
    assert seen == pytest.approx([0.1 * 0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(4)], rel=1e-4)


def test_spreading_and_summing_are_adjoint() -> None:
    for scheme in GRIDS:
        spread = Spread(scheme, 24, 48)
        grid, matrix = torch.randn(spread.grid).double(), torch.randn(24, 48).double()
        over = (spread.out(grid) * spread.view(matrix)).sum()
        assert float(over) == pytest.approx(float((grid * spread.sum(spread.view(matrix))).sum()))


def test_wrong_calls_are_told() -> None:
    w, h = layer()
    for change, said in (
        ({"lr": 0.0}, "lr must be positive, not 0.0"),
        ({"steps": 0}, "steps must be at least 1, not 0"),
        ({"start": "best"}, "start must be one of nearest, gptq, not 'best'"),
    ):
        with pytest.raises(ValueError, match=said):
            learned(w, Int(4) @ channel(), hessian=h, **change)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="bits must be 2 to 8 for FlexRound, not 1"):
        learned(w, Int(1) @ channel(), hessian=h)
    with pytest.raises(ValueError, match="AdaRound learns codes of integers"):
        learned(w, Float(2, 1) @ group(16), hessian=h, soft=UpOrDown())
    with pytest.raises(ValueError, match="hessian"):
        learned(w, Int(4) @ channel(), hessian=h[:5])
    for knobs in ({"penalty": -1.0}, {"warmup": 1.0}, {"beta": (20.0, 0.0)}):
        with pytest.raises(ValueError, match=next(iter(knobs))):
            UpOrDown(**knobs)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rank"):
        Division(rank=0)


def test_a_layer_without_inputs_is_rounded_to_nearest() -> None:
    scheme = Int(4) @ channel()
    found = Learned(steps=5).round(weight(), scheme, scheme.fit(weight()), None)
    assert found.fallback == "rounded to nearest: 0 calibration tokens"
    assert isinstance(found.tensor, QTensor) and torch.equal(found.tensor.codes, nearest(weight(), scheme).codes)
