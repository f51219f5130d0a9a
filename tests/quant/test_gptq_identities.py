"""GPTQ's factor, its loss, and the Hessians that it sees (Frantar et al., ICLR 2023), each against plain linear algebra in float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dither
import tiny_models
from dither.formats import Clip, Float, Int, Params, Scheme, channel, group, tile
from dither.quant.linear import QuantLinear
from dither.quant.recipes import GPTQ, RTN
from dither.quant.rounding.columns import LEAF, Columns, check_hessian, columns, damped_inverse_factor, inverse_of_lower
from dither.quant.statistics import Statistics
from kernels.problems import hessian


def with_dead(h: Tensor, *dead: int) -> Tensor:
    """The Hessian where some inputs were always zero."""
    h = h.clone()
    h[list(dead)] = 0
    h[:, list(dead)] = 0
    return h


def damped(h: Tensor, damp: float) -> Tensor:
    """``H + d mean(diag H) I``, where a zero on the diagonal counts as 1."""
    diagonal = torch.where(h.diagonal() == 0, 1.0, h.diagonal())
    return h - torch.diag(h.diagonal()) + torch.diag(diagonal + damp * diagonal.mean())


# -- the factor ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("dead", [(), (0,), (299,), (5, 6, 150, 298)], ids=str)
@pytest.mark.parametrize("damp", [0.01, 1.0])
def test_the_factor_is_that_of_the_inverse(damp: float, dead: tuple[int, ...], ordered: bool) -> None:
    """``U^T U = (H + d mean(diag H) I)^-1``, U upper triangular; 300 inputs are several leaves of the inversion."""
    h = with_dead(hessian(300, 7, damp=0), *dead)
    before = h.clone()
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1)) if ordered else torch.arange(300)
    upper, found = damped_inverse_factor(h, damp, order if ordered else None)
    wanted = torch.linalg.inv(damped(h, damp)[order][:, order])
    assert found == damp and torch.equal(h, before) and torch.equal(upper, upper.triu()) and bool((upper.diagonal() > 0).all())
    assert float((upper.T @ upper - wanted).abs().max()) < 1e-10 * float(wanted.abs().max())


@pytest.mark.parametrize("size", [0, 1, 2, LEAF, LEAF + 1, 3 * LEAF + 2])
def test_inverse_by_halves(size: int) -> None:
    lower = torch.randn(size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tril() / 10 + torch.eye(size)
    inverse = inverse_of_lower(lower)
    assert torch.equal(inverse, inverse.tril())
    torch.testing.assert_close(inverse @ lower, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-10)


# -- the loss -----------------------------------------------------------------------------------------------------------


SCHEMES = [Int(3) @ channel(), Int(2) @ group(16), Int(4, zero="float") @ group(40), Int(3, sym="full") @ group(16), Float(2, 1) @ group(24)]
TIGHT = 0.4  # many weights lie beyond their grid
STATIC: list[dict[str, Any]] = [{}, {"act_order": False}, {"act_order": False, "block": 7}, {"damp": 1.0}]
DYNAMIC: list[dict[str, Any]] = [{"block": 128}, {"block": 24, "compat": "reference"}]
CASES = list(itertools.product(STATIC, [*SCHEMES, Int(3) @ tile(4, 16)], [None, Clip(p=2, grid=10, shrink=0.6), TIGHT]))
CASES += [(knobs | {"act_order": False, "static_groups": False}, scheme, None) for knobs in DYNAMIC for scheme in SCHEMES]


@pytest.mark.parametrize(("knobs", "scheme", "clip"), CASES, ids=str)
def test_the_loss_is_the_damped_quadratic(knobs: dict[str, Any], scheme: Scheme, clip: Clip | float | None) -> None:
    """``sum e^2 = tr (W - Q) (H + d mean(diag H) I) (W - Q)^T``, since ``W - Q = E U`` and ``U H U^T = I``: on any grid, in any order."""
    part = Columns(**knobs)
    w, h = torch.randn(20, 130, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 3, hessian(130, 2, damp=0)
    params: Params | None = None
    if isinstance(clip, Clip):
        params = scheme.fit(w, clip=clip)
    elif clip is not None:
        params = scheme.fit(w.clamp(-clip, clip))
    rounded = part.solve(w, h, scheme, params)
    q = scheme.decode(rounded.tensor.codes, {k: v.double() for k, v in rounded.tensor.params.items()})
    d = w - q
    assert rounded.damp == part.damp and rounded.loss is not None
    assert 2 * rounded.loss == pytest.approx(float(((d @ damped(h, part.damp)) * d).sum()), rel=1e-9)


@pytest.mark.parametrize("act_order", [False, True])
def test_inputs_that_were_always_zero_cost_nothing(act_order: bool) -> None:
    w, h = torch.randn(20, 130, generator=torch.Generator().manual_seed(0), dtype=torch.float64), with_dead(hessian(130, 2, damp=0), 3, 77)
    scheme = Int(3) @ group(16)
    rounded = Columns(act_order=act_order).solve(w, h, scheme)
    d = w - rounded.tensor.dequantize(torch.float64)
    assert torch.equal(d[:, [3, 77]], w[:, [3, 77]])
    d[:, [3, 77]] = 0
    assert 2 * (rounded.loss or 0) == pytest.approx(float(((d @ damped(h, 0.01)) * d).sum()), rel=1e-9)


# -- what is refused, and what is said ----------------------------------------------------------------------------------


def asymmetric() -> Tensor:
    h = hessian(24, 0)
    h[3, 5] += 1e-3 * h.abs().max()
    return h


@pytest.mark.parametrize(
    ("h", "why"),
    [
        (hessian(23, 0), r"shape \(23, 23\), but the weight has 24 inputs"),
        (hessian(24, 0)[:, :20], r"shape \(24, 20\)"),
        (hessian(24, 0).fill_diagonal_(torch.nan), "NaN or inf"),
        (hessian(24, 0).fill_diagonal_(torch.inf), "NaN or inf"),
        (asymmetric(), "not symmetric"),
    ],
    ids=["size", "oblong", "nan", "inf", "asymmetric"],
)
def test_wrong_hessians_are_named(h: Tensor, why: str) -> None:
    with pytest.raises(ValueError, match=f"^layer 3: .*{why}"):
        check_hessian(h, 24, "layer 3")
    with pytest.raises(ValueError, match=f"^hessian: .*{why}"):
        columns(torch.randn(8, 24), h, Int(4) @ channel())
    check_hessian(hessian(24, 0), 24)
    check_hessian(hessian(24, 0).float(), 24)
    check_hessian(torch.zeros(0, 0), 0)


@pytest.mark.parametrize(("tokens", "said"), [(127, "2 layers saw"), (128, "1 layers saw"), (191, "1 layers saw"), (192, "")])
def test_too_few_tokens_are_said(tokens: int, said: str) -> None:
    """Fewer than 4 an input, that is below 128 for 32 inputs and below 192 for 48; and only where a Hessian is used."""
    net = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16))
    data = [{"input": torch.randn(tokens, 32)}]
    first = f"fewer than 4 calibration tokens an input (first {0 if tokens < 128 else 2}: {tokens} for {32 if tokens < 128 else 48})"
    notes = [n for n in dither.quantize(net, GPTQ(group=16), data).report.notes if "calibration tokens" in n]
    assert len(notes) == bool(said) and all(n.startswith(f"{said} {first}") for n in notes)
    assert not any("calibration tokens" in n for n in dither.quantize(net, RTN(group=16), data).report.notes)


# -- true sequential ----------------------------------------------------------------------------------------------------


PADDED = {
    "input_ids": torch.randint(3, tiny_models.VOCABULARY, (6, 24), generator=torch.Generator().manual_seed(0)),
    "attention_mask": (torch.arange(24) < torch.tensor([24, 20, 9, 24, 13, 24])[:, None]).long(),
}
WHOLE = {"input_ids": torch.randint(3, tiny_models.VOCABULARY, (6, 24), generator=torch.Generator().manual_seed(1))}


@torch.no_grad()
def hessians(model: nn.Module, names: list[str], batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """``mean x x^T`` of the inputs that each layer gets when the model runs over the batches, padding left out."""
    found = {n: torch.zeros(()) for n in names}
    count, current = 0, [torch.zeros(0)]

    def hook(name: str) -> Any:
        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0][current[0]].double()
            found[name] = found[name] + x.T @ x

        return add

    handles = [model.get_submodule(n).register_forward_pre_hook(hook(n)) for n in names]
    for batch in batches:
        current[0] = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        count += int(current[0].sum())
        model(**batch)
    for handle in handles:
        handle.remove()
    return {n: h / count for n, h in found.items()}


@pytest.mark.parametrize("batches", [[WHOLE], [WHOLE, PADDED]], ids=["whole", "padded"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2"])
def test_each_layer_is_rounded_for_the_inputs_that_the_finished_model_gives_it(
    name: str, batches: list[dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    plain = Columns.round

    def recording(self: Columns, weight: Tensor, scheme: Scheme, params: Params, statistics: Statistics | None) -> Any:
        assert statistics is not None
        seen.append((weight.clone(), statistics.hessian.clone()))
        return plain(self, weight, scheme, params, statistics)

    monkeypatch.setattr(Columns, "round", recording)
    model, _ = tiny_models.build(name)
    result = dither.quantize(model, GPTQ(bits=2, group=16), batches, compute=torch.float32)
    names = [row.name for row in result.report.layers]
    assert len(seen) == len(names) == 14
    assert all(torch.equal(w, model.get_submodule(n).weight) for (w, _), n in zip(seen, names, strict=True))
    assert all(isinstance(result.model.get_submodule(n), QuantLinear) for n in names)
    final, before = hessians(result.model, names, batches), hessians(model, names, batches)

    def apart(a: Tensor, b: Tensor) -> float:
        return float((a - b).abs().max() / b.abs().max())

    assert max(apart(h, final[n]) for (_, h), n in zip(seen, names, strict=True)) < 1e-4
    assert max(apart(h, before[n]) for (_, h), n in zip(seen, names, strict=True)) > 1e-2  # and not those of the float model
