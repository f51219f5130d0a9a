"""Methods with number formats by name, few-bit inputs and keys: one option, whatever rounds."""

from __future__ import annotations

import pytest
import torch

import dither
import tiny_models
from dither.errors import UsageError
from dither.formats import NVFP4, Float, Int, Scheme, channel, group, token
from dither.quant.recipe import Chain
from dither.quant.recipes import AWQ, GPTQ, METHODS, RTN, build, parse

TOKENS = torch.randint(3, tiny_models.VOCABULARY, (8, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["fp4", "fp8", "mxfp4", "nvfp4", "e3m2"])
@pytest.mark.parametrize("method", ["rtn", "gptq", "awq+gptq"])
def test_every_rounding_takes_every_format(method: str, name: str) -> None:
    model, sample = tiny_models.build("llama")
    with torch.no_grad():
        before = model(**sample).logits
    made = dither.quantize(model, build(method, {"format": name, "act_format": name}), TOKENS)
    weights = build(method, {"format": name}).recipe().weights
    assert {row.scheme for row in made.report.layers} == {str(weights)}
    inputs = weights if name in ("mxfp4", "nvfp4") else weights.format @ token()
    assert {row.inputs for row in made.report.layers} == {f"{inputs} dynamic"}
    with torch.no_grad():
        error = (made.model(**sample).logits - before).norm() / before.norm()
    assert 0 < error < (0.1 if name == "fp8" else 0.5)


def test_what_the_knobs_mean() -> None:
    assert RTN(format="fp8", group=None).scheme() == Float(4, 3) @ channel()
    assert RTN(format="fp4", scale="bfloat16", group=32).scheme() == Float(2, 1, scale="bfloat16") @ group(32)
    assert RTN(format="nvfp4", bits=4, group=16).scheme() == NVFP4
    assert str(GPTQ(act_format="mxfp4", act_group=32).inputs()) == "e2m1 e8m0 scales group(32) dynamic"
    assert GPTQ().inputs() is None and GPTQ().kv() is None and GPTQ(kv_bits=3).kv().format == Int(3)  # type: ignore[union-attr]
    assert parse({"method": "gptq", "format": "fp8", "act_format": "fp8"}).recipe().inputs == GPTQ(act_format="fp8").inputs()


def test_a_chain_keeps_what_any_of_its_methods_asks_of_inputs() -> None:
    recipe = Chain(AWQ(round=False, act_bits=8), GPTQ(kv_bits=4)).recipe()
    assert recipe.inputs == RTN(act_bits=8).inputs() and recipe.kv == RTN(kv_bits=4).kv()
    with pytest.raises(UsageError, match="inputs: the methods ask for different schemes"):
        Chain(AWQ(round=False, act_bits=8), GPTQ(act_bits=4)).recipe()


@pytest.mark.parametrize("method", METHODS)
def test_no_method_ignores_a_format(method: str) -> None:
    """It is used, or refused."""
    for knob in ("format", "act_format"):
        try:
            recipe = build(method, {knob: "fp8"}).recipe()
        except UsageError as error:
            assert knob in str(error)
        else:
            found = recipe.weights if knob == "format" else recipe.inputs
            assert isinstance(found, Scheme) and found.format == Float(4, 3)


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("rtn", {"format": "fp8", "weights": Int(4) @ group(16)}, "format: weights="),
        ("rtn", {"format": "nvfp4", "scale": "bfloat16"}, "scale: format 'nvfp4' has scales of its own"),
        ("rtn", {"format": "fp8", "bits": 2}, "bits: fp8 has 8 bits, not 2"),
        ("gptq", {"act_format": "nvfp4", "act_group": 32}, "act_group: nvfp4 has groups of 16, not 32"),
    ],
)
def test_what_does_not_fit_is_refused(method: str, options: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        build(method, options)
