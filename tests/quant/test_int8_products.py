"""Layers whose weights and inputs are integers: which of them multiply integers on the CPU, and that this is what rounded inputs times the decoded
weight give, in a layer, in a model, and in perplexity."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dither
import tiny_models
from dither import models
from dither.formats import Float, Int, QTensor, Scheme, channel, group, tile, token
from dither.kernels.extension import extension
from dither.quant.cpu_products import cpu_kind
from dither.quant.evaluate import open_model
from dither.quant.inputs import InputQuant
from dither.quant.judge import perplexity
from dither.quant.linear import QuantLinear, decoded
from dither.quant.recipe import Recipe

TEXT = Path(os.environ.get("DITHER_DATA", "")) / "text"
compiled = pytest.mark.skipif(extension() is None, reason="the C++ extension is not installed")
S8 = Int(8, sym="restricted", scale="float32") @ token()
WEIGHTS = [Int(4) @ group(32), Int(8) @ channel(), Int(8, sym="full", scale="bfloat16") @ group(64), Int(3, sym="extremum") @ group(50)]
INPUTS = [S8, Int(8) @ token(), Int(8, sym="extremum") @ token(), Int(4, sym="full", scale="bfloat16") @ token()]


def layer(scheme: Scheme, inputs: Scheme, columns: int = 200, rows: int = 70) -> QuantLinear:
    g = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(rows, columns, generator=g), torch.randn(rows, generator=g)
    params = scheme.fit(weight)
    stored = QTensor.from_codes(scheme.encode(weight, params), params, scheme)
    return QuantLinear(scheme, columns, rows, bias, stored.tensors(), inputs=InputQuant(inputs).module())


def truth(held: QuantLinear, x: Tensor) -> tuple[Tensor, Tensor]:
    """Rounded inputs times the decoded weight in float64, without bias, and the sums of absolute values."""
    assert held.inputs is not None
    rounded, weight = held.inputs(x.float()).double(), held.dequantize(torch.float32).double()
    return rounded @ weight.T, rounded.abs() @ weight.abs().T


@pytest.mark.parametrize(
    ("scheme", "inputs", "name"),
    [
        *((w, S8, "int8") for w in WEIGHTS),
        *((Int(4) @ group(32), i, "int8") for i in INPUTS),
        (Int(4) @ group(32), Int(8) @ group(64), "affine"),  # several scales a token
        (Int(4) @ group(32), Int(8) @ group(256), "int8"),  # one, in other words
        (Int(4) @ group(32), Int(8, zero="float") @ token(), "affine"),
        (Int(4) @ group(32), Int(8, scale="e8m0") @ token(), "affine"),
        (Int(4) @ group(32), Float(4, 3) @ token(), "affine"),
        (Int(4, zero="float") @ group(32), S8, None),
        (Int(4) @ tile(2, 20), S8, None),
        (Float(4, 3) @ channel(), S8, "float"),
    ],
    ids=str,
)
def test_which_kernel_a_layer_takes(scheme: Scheme, inputs: Scheme, name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    rounding = InputQuant(inputs).module()
    kind = cpu_kind(scheme, rounding, 200)
    assert (None if kind is None else kind.name) == name
    if name == "int8" and extension() is not None:  # without vectors decoding is faster
        monkeypatch.setenv("DITHER_ISA", "scalar")
        other = cpu_kind(scheme, rounding, 200)
        assert other is not None and other.name == "affine"


def test_static_and_shifted_inputs_and_sums_beyond_int32_take_others() -> None:
    scheme, x = Int(8) @ channel(), torch.randn(4, 200)
    for rounding in (InputQuant(S8, S8.fit(x)), InputQuant(S8, shift=torch.ones(200, dtype=torch.int8))):
        kind = cpu_kind(scheme, rounding.module(), 200)
        assert kind is not None and kind.name == "affine"
    kind = cpu_kind(scheme, InputQuant(S8).module(), 40_000)
    assert kind is not None and kind.name == "affine"


@compiled
@pytest.mark.parametrize("scheme", WEIGHTS, ids=str)
@pytest.mark.parametrize("inputs", INPUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_integers_give_what_decoded_weights_give(scheme: Scheme, inputs: Scheme, dtype: torch.dtype) -> None:
    held = layer(scheme, inputs)
    bias, held.bias = held.bias, None
    for rows in (1, 8, 9, 40):
        x = torch.randn(2, rows, 200, generator=torch.Generator().manual_seed(rows)).to(dtype)
        found, (expected, size) = held(x), truth(held, x)
        assert held._product is not None and found.dtype == dtype
        unit = 2.0**-20 if dtype == torch.float32 else 2.0**-8
        assert bool(((found.double() - expected).abs() <= unit * size).all())
    held.bias = bias
    assert bias is not None and torch.equal(held(x), found + bias.to(dtype))


@compiled
def test_no_weight_is_kept_in_long_work_and_nothing_changes() -> None:
    held, x = layer(WEIGHTS[0], INPUTS[1]), torch.randn(30, 200)
    outside = held(x)
    with decoded(held):
        assert torch.equal(held(x), outside) and held._kept is None and not held._keeps
    half = layer(WEIGHTS[0], INPUTS[1]).half()  # no kernel takes float16: there a weight is kept
    with decoded(half):
        half(x.half())
        assert half._kept is not None


@compiled
@pytest.mark.parametrize("rows", [2, 20])
def test_what_is_not_finite_is_said_to_be_an_input(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    held, x = layer(WEIGHTS[0], INPUTS[1]), torch.randn(rows, 200)
    x[1, 3] = float("nan")
    messages = []
    for path in ("", "reference"):
        monkeypatch.setenv("DITHER_KERNELS", path)
        with pytest.raises(ValueError, match=r"inputs: rows that are to be rounded to .* hold NaN or inf") as error:
            held(x)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_gradients_go_through_the_decoded_weight() -> None:
    held, x = layer(WEIGHTS[0], S8), torch.randn(3, 200, requires_grad=True)
    assert held(x).requires_grad


@compiled
@pytest.mark.parametrize(("rows", "inputs"), [(1, INPUTS[1]), (20, INPUTS[3])])
def test_a_layer_compiles_whole(rows: int, inputs: Scheme) -> None:
    held, x = layer(WEIGHTS[0], inputs), torch.randn(rows, 200)
    targets: list[object] = []

    def keep(graph: torch.fx.GraphModule, given: list[Tensor]) -> object:
        targets.extend(node.target for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    found = torch.compile(held, fullgraph=True, backend=keep)(x)
    assert torch.ops.dither.rounded_matmul.default in targets and torch.equal(found, held(x))


def simulated(model: nn.Module) -> nn.Module:
    """``model`` with its few-bit layers as float layers of the decoded weight, behind the rounding of their inputs."""
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantLinear) and module.inputs is not None:
            plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            plain.weight, plain.bias = nn.Parameter(module.weight), module.bias
            model.set_submodule(name, nn.Sequential(module.inputs, plain))
    return model


@compiled
@pytest.mark.parametrize("bits", [4, 8])
@torch.no_grad()
def test_a_model_of_integers(bits: int) -> None:
    """A rounding that falls to the other side of a tie moves a hidden state by a step, so logits agree to a part of what rounding inputs costs."""
    model, sample = tiny_models.build("llama")
    few = dither.quantize(model, dither.recipes.RTN(bits=bits, group=16, act_bits=8)).model
    assert isinstance(few, nn.Module)
    layers = [m for m in few.modules() if isinstance(m, QuantLinear)]
    found = few(**sample).logits
    assert layers and all(m._product is not None and m.cpu_kind is not None and m.cpu_kind.name == "int8" for m in layers)
    exact = dither.quantize(model, dither.recipes.RTN(bits=bits, group=16)).model
    assert isinstance(exact, nn.Module)
    cost = (found - exact(**sample).logits).abs().max()
    assert float((found - simulated(few)(**sample).logits).abs().max()) < 0.05 * float(cost)


class Summed(nn.Module):
    """A few-bit layer as rounded inputs times the decoded weight, its columns summed in float64, in float32, or in float32 a half at a time."""

    def __init__(self, held: QuantLinear, how: str) -> None:
        super().__init__()
        assert held.inputs is not None and held.bias is None
        self.inputs, self.matrix, self.how = held.inputs, held.dequantize(torch.float32), how

    def forward(self, x: Tensor) -> Tensor:
        x = self.inputs(x)
        if self.how == "float64":
            return (x.double() @ self.matrix.double().T).float()
        cut = x.shape[-1] // 2 if self.how == "halves" else x.shape[-1]
        linear = nn.functional.linear
        return linear(x[..., :cut], self.matrix[:, :cut]) + linear(x[..., cut:], self.matrix[:, cut:])


@compiled
@pytest.mark.slow
@pytest.mark.skipif(not (TEXT / "wiki.test.raw").is_file(), reason="DITHER_DATA has no WikiText-2")
@pytest.mark.parametrize("recipe", ["W8A8", "W4A8"])
def test_a_language_model_of_integers(recipe: str) -> None:
    """Every layer, on what it really meets, is right to float32's roundings. Perplexity cannot be held to a part in a thousand: an input that falls
    to the other side of a tie moves by a step, and large activations make steps large, so rounded floats summed in another order differ by more than
    that from each other. It is held to what they differ by."""
    model, tokenizer = open_model("smollm2")
    text = models.wikitext_join(models.read_text(TEXT / "wiki.test.raw"))
    weights = Int(8, sym="restricted") @ channel() if recipe == "W8A8" else Int(4) @ group(64)
    few = dither.quantize(model, Recipe((), weights, inputs=replace(Int(8) @ token(), dynamic=True))).model
    assert isinstance(few, nn.Module)
    layers = {name: m for name, m in few.named_modules() if isinstance(m, QuantLinear)}
    worst: list[float] = []

    def compare(held: nn.Module, args: tuple[Tensor], y: Tensor) -> None:
        assert isinstance(held, QuantLinear)
        expected, size = truth(held, args[0])
        groups = held.get_buffer("scale").shape[1]
        worst.append(float(((y.double() - expected).abs() / size).max()) / ((3 * groups + 3) * 2.0**-24))

    hooks = [m.register_forward_hook(compare) for m in layers.values()]
    found = perplexity(few, text, tokenizer, windows=1).perplexity
    assert len(worst) >= len(layers) and max(worst) < 1 and all(m._product is not None for m in layers.values())
    for hook in hooks:
        hook.remove()
    simulated_: dict[str, float] = {}
    for how in ("float64", "float32", "halves"):
        for name, held in layers.items():
            few.set_submodule(name, Summed(held, how))
        simulated_[how] = perplexity(few, text, tokenizer, windows=1).perplexity
    spread = max(simulated_.values()) - min(simulated_.values())
    assert abs(found - simulated_["float64"]) <= spread < 0.02 * found
