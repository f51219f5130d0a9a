"""SmoothQuant against eq. 4 of the paper and what follows from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import dither
import tiny_models
from dither.errors import UsageError
from dither.graph import discover
from dither.quant.recipe import as_recipe
from dither.quant.recipes import RTN, SmoothQuant, build
from rewriting import TOKENS


class Normed(nn.Module):
    """A residual block: a norm in front of two linear layers that read it."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(width), nn.Linear(width, 48), nn.Linear(width, 48)
        self.out = nn.Linear(48, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        out: torch.Tensor = self.out(self.a(y).tanh() * self.b(y))
        return x + out


def net() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(Normed(), Normed())
    with torch.no_grad():
        for block in model:
            block.norm.weight[3] *= 40  # an outlier channel, with weights to match
            for layer in (block.a, block.b):
                layer.weight[:, 3] /= 40
    return model.requires_grad_(False)


X = torch.randn(24, 10, 32, generator=torch.Generator().manual_seed(5))


def peaks(block: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """max |X_j| behind the norm, and max |W_j| over both readers."""
    y = block.norm(x)
    return y.abs().amax((0, 1)), torch.cat([block.a.weight, block.b.weight]).abs().amax(0)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0])
def test_eq_4(alpha: float) -> None:
    model = net()
    skip = ("*.out",)
    result = dither.quantize(model, SmoothQuant(alpha=alpha, skip=skip, act_bits=None), {"input": X}, compute=torch.float32)
    before_x, before_w = peaks(model[0], X)
    s = before_x**alpha / before_w ** (1 - alpha)
    smooth: Any = result.model[0]
    assert torch.allclose(smooth.norm.weight, model[0].norm.weight / s, rtol=1e-5)
    assert torch.allclose(smooth.norm.bias, model[0].norm.bias / s, rtol=1e-5)
    step = 2 * (before_w * s).max() / 254  # of the coarsest row
    for layer in ("a", "b"):
        wanted = getattr(model[0], layer).weight * s
        assert float((getattr(smooth, layer).weight - wanted).abs().max()) <= float(step) * 0.51


def test_half_and_half_makes_inputs_and_weights_equally_large() -> None:
    model = net()
    result = dither.quantize(model, SmoothQuant(skip=("*.out",), act_bits=None), {"input": X}, compute=torch.float32)
    largest, weights = peaks(result.model[0], X)
    assert torch.allclose(largest, weights, rtol=0.02)
    plain, _ = peaks(model[0], X)
    assert float(largest.max() / largest.median()) < 0.5 * float(plain.max() / plain.median())


def test_outliers_cost_less() -> None:
    """A planted outlier channel: with one scale a tensor of inputs, most of the error of round-to-nearest is gone."""
    model = net()
    with torch.no_grad():
        truth = model(X)
        errors = []
        for method in (RTN(bits=8, group=None, sym=True, act_bits=8), SmoothQuant()):
            found = dither.quantize(model, method, {"input": X}, compute=torch.float32).model(X)
            errors.append(float((found - truth).square().mean()))
    assert errors[1] < 0.2 * errors[0]


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss", "llama", "mamba"])
def test_dead_channels_and_experts(name: str) -> None:
    """Everywhere: experts' inputs too. A channel that is never active keeps the scale 1, and nothing is lost."""
    model, sample = tiny_models.build(name)
    model.requires_grad_(False)
    structure = discover(model, sample)
    for site in structure.sites:
        if site.kind == "scale" and site.producer.is_vector and site.producer.offset == 0:
            model.get_parameter(site.producer.parameter).view(-1)[1] = 0
    result = dither.quantize(model, SmoothQuant(everywhere=True, gqa=True, act_bits=None), TOKENS, compute=torch.float32)
    with torch.no_grad():
        truth, found = model(TOKENS)[0], result.model(TOKENS)[0]
    assert result.report.sites and bool(torch.isfinite(found).all())
    assert float((found - truth).square().mean()) < 1e-3 * float(truth.square().mean())


def test_knobs() -> None:
    with pytest.raises(UsageError, match="alpha must be within"):
        build("smoothquant", {"alpha": 1.5})
    joined = as_recipe(build("smoothquant+gptq", {"bits": 4, "group": 16}))
    assert joined.name == "smoothquant+gptq" and len(joined.transforms) == 1 and joined.inputs is not None
    assert not as_recipe(build("smoothquant+gptq", {"bits": 4, "act_bits": None})).inputs
