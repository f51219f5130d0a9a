"""Which weights GPTQ's grids span: as clipped, as updated within the loop, without dead inputs; and what it says of inputs that are not finite."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dither.errors import UsageError
from dither.formats import Clip, Int, Params, Scheme, group
from dither.quant import Chain, quantize
from dither.quant.recipes import AWQ, GPTQ
from dither.quant.rounding.columns import Columns, columns

WIDTH = 32


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(WIDTH, 24, bias=False))


class Overflow(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.square().square()


def inputs(seed: int = 1) -> Tensor:
    return torch.randn(256, WIDTH, generator=torch.Generator().manual_seed(seed))


def hessian(x: Tensor) -> Tensor:
    return x.T.double() @ x.double() / len(x)


def rounded(recipe: GPTQ, net: nn.Module, x: Tensor) -> Tensor:
    return quantize(net, recipe, [{"input": x}]).model[0].weight  # type: ignore[index]


def test_a_dead_input_does_not_widen_the_grid() -> None:
    net, x = model(), inputs()
    x[:, 5] = 0
    with torch.no_grad():
        net[0].weight[:, 5] = 50.0
    scheme = Int(4) @ group(8)
    direct = columns(net[0].weight.detach(), hessian(x), scheme)
    found = rounded(GPTQ(group=8), net, x)
    assert torch.equal(found, direct.dequantize())
    assert float(found[:, :8].abs().max()) < 2  # its own weight is rounded to nothing, and the others of its group keep fine steps


def test_clipping_within_the_loop() -> None:
    net, x = model(), inputs()
    recipes = [GPTQ(bits=3, group=8, act_order=False, static_groups=False, clip=clip) for clip in ("none", "power")]
    plain, clipped = (rounded(r, net, x) for r in recipes)
    assert not torch.equal(plain, clipped)
    # the first group is reached before any update, so its grid is that of the weights as they are
    weight, scheme = net[0].weight.detach()[:, :8].contiguous(), Int(3) @ group(8)
    for clip, decoded in ((None, plain), (Clip(), clipped)):
        params: Params = scheme.fit(weight, clip=clip)
        again = scheme.quantize(decoded[:, :8].contiguous(), params)
        assert torch.allclose(again, decoded[:, :8], atol=1e-6)


@pytest.mark.parametrize("make", [lambda: GPTQ(act_order=False, static_groups=False, clip="output").recipe(),
                                  lambda: Chain(AWQ(round=False), GPTQ(act_order=False, static_groups=False)).recipe()])  # fmt: skip
def test_searches_before_a_loop_that_makes_its_own_grids_are_refused(make: object) -> None:
    with pytest.raises((ValueError, UsageError), match=r"static_groups=False|would be lost"):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("method", [GPTQ(group=8), AWQ(group=8)])
def test_inputs_that_are_not_finite_name_the_layer(method: object) -> None:
    net, x = nn.Sequential(nn.Linear(WIDTH, WIDTH), Overflow(), nn.Linear(WIDTH, 24)), inputs()
    x[100] = 1e12
    with pytest.raises(ValueError, match=r"\b2: the layer's input holds NaN or inf"):
        quantize(net, method, [{"input": x}])  # type: ignore[arg-type]


def test_all_groups_of_a_ragged_matrix_are_clipped_through_the_output() -> None:
    from dither.quant.grids import OutputClip
    from dither.quant.statistics import HESSIAN, Statistics

    g = torch.Generator().manual_seed(0)
    weight, mix = torch.randn(6, 20, generator=g), torch.randn(20, 20, generator=g)
    statistics = Statistics(20, frozenset({HESSIAN}))
    x = torch.randn(400, 20, generator=g) @ mix
    statistics.update(x)
    scheme: Scheme = Int(3) @ group(8)
    params = OutputClip().fit(weight, scheme, statistics)
    for first, last in ((0, 8), (8, 16), (16, 20)):  # each group as a matrix of its own
        alone = Statistics(last - first, frozenset({HESSIAN}))
        alone.update(x[:, first:last])
        own = OutputClip().fit(weight[:, first:last].contiguous(), Int(3) @ group(last - first), alone)
        assert torch.allclose(params["scale"][:, first // 8], own["scale"][:, 0])


def test_a_search_within_the_loop_is_no_part_of_what_is_stored() -> None:
    recipe = GPTQ(act_order=False, static_groups=False, clip="power").recipe()
    assert recipe.rounding == Columns(act_order=False, static_groups=False, clip=Clip()) and recipe.rounding.own_grid
    assert recipe.weights == GPTQ().recipe().weights and not Columns().own_grid
    with pytest.raises(ValueError, match="static_groups=False"):
        Columns(clip=Clip())


@pytest.mark.parametrize("name", ["fp4", "nvfp4"])
def test_every_format_is_clipped_within_the_loop(name: str) -> None:
    recipe = GPTQ(format=name, group=16, act_order=False, static_groups=False, clip="power")
    assert bool(rounded(recipe, model(), inputs()).isfinite().all())
