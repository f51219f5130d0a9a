"""Linear layers whose codes are multiplied on a GPU (in Triton's interpreter, where there is none), and while torch traces."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from dither.formats import MXFP4, Float, Int, QTensor, Scheme, channel, group, tensor, token
from dither.quant.inputs import InputQuant
from dither.quant.linear import QuantLinear, decoded
from dither.quant.products import _multiplied, kernel_for

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
S8 = Int(8, sym="restricted", scale="float32") @ token()
E4M3 = Float(4, 3) @ token()


def layer(scheme: Scheme, inputs: Scheme | None = None, columns: int = 64) -> QuantLinear:
    g = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(24, columns, generator=g), torch.randn(24, generator=g)
    params = scheme.fit(weight)
    stored = QTensor.from_codes(scheme.encode(weight, params), params, scheme)
    rounding = None if inputs is None else InputQuant(inputs).module()
    return QuantLinear(scheme, columns, 24, bias, stored.tensors(), inputs=rounding).to(DEVICE)


@pytest.mark.parametrize(
    ("scheme", "inputs", "kind"),
    [
        (Int(4) @ group(32), None, "packed"),
        (Int(8, sym="full") @ channel(), None, "packed"),
        (Int(2, scale="bfloat16") @ group(128), None, "packed"),  # one group is the row
        (Int(4) @ group(32), S8, "packed"),
        (Int(8) @ channel(), S8, "int8"),
        (Int(8) @ channel(), Int(8) @ token(), "packed"),  # inputs with zero points
        (Int(8) @ group(32), S8, "packed"),
        (Float(4, 3) @ channel(), E4M3, "float8"),
        (Float(4, 3) @ tensor(), E4M3, "float8"),
        (Float(4, 3) @ channel(), None, None),
        (Float(4, 3) @ channel(), S8, None),
        (Float(4, 3, nan=False) @ channel(), E4M3, None),
        (Float(5, 2) @ channel(), E4M3, None),
        (Int(3) @ group(32), None, None),
        (Int(4) @ group(24), None, None),
        (Int(4, zero="float") @ group(32), None, None),
        (Int(4, scale="e8m0") @ group(32), None, None),
        (Int(4) @ tensor(), None, None),
        (MXFP4, None, None),
    ],
    ids=str,
)
def test_which_kernel_a_layer_takes(scheme: Scheme, inputs: Scheme | None, kind: str | None) -> None:
    assert kernel_for(scheme, None if inputs is None else InputQuant(inputs).module(), 64) == kind


def test_static_and_shifted_inputs_take_no_kernel_that_rounds() -> None:
    x = torch.randn(4, 64)
    static = InputQuant(S8, S8.fit(x)).module()
    shifted = InputQuant(E4M3, shift=torch.ones(64, dtype=torch.int8)).module()
    assert kernel_for(Int(8) @ channel(), static, 64) == "packed"
    assert kernel_for(Float(4, 3) @ channel(), shifted, 64) is None


@pytest.mark.parametrize(
    ("scheme", "inputs"),
    [
        (Int(4) @ group(32), None), (Int(8, sym="full") @ channel(), None), (Int(2) @ group(16), None), (Int(8) @ channel(), S8),
        (Int(8, sym="restricted") @ channel(), S8), (Float(4, 3) @ channel(), E4M3), (Float(4, 3) @ tensor(), E4M3),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("rows", [1, 5])
def test_codes_give_what_decoded_weights_give(scheme: Scheme, inputs: Scheme | None, rows: int) -> None:
    pytest.importorskip("triton")
    held = layer(scheme, inputs)
    if held.kernel == "float8" and DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this device does not multiply float8")
    x = torch.randn(2, rows, 64, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    rounded = x if held.inputs is None else held.inputs(x)
    expected = rounded.double() @ held.weight.double().T
    assert held.kernel is not None
    direct = x if held.kernel != "packed" else rounded
    found = _multiplied(held.kernel, held, direct.reshape(-1, 64), False).view(2, rows, 24)
    unit = 2.0**-10 if held.kernel == "float8" and DEVICE == "cuda" else 2.0**-18
    assert bool(((found.double() - expected).abs() <= unit * (rounded.abs().double() @ held.weight.abs().double().T)).all())
    if DEVICE == "cuda":
        assert held.bias is not None and torch.equal(held(x), found + held.bias)
        with decoded(held):
            assert not held._keeps


@pytest.mark.parametrize("rows", [1, 3])
def test_a_layer_compiles_whole(rows: int) -> None:
    held = layer(Int(4) @ group(32))
    model = nn.Sequential(held, nn.ReLU())
    x = torch.randn(rows, 64, device=DEVICE)
    expected = model(x)
    targets: list[object] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        targets.extend(node.target for node in graph.graph.nodes)
        return graph.forward

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = torch.compile(model, fullgraph=True, backend=keep)(x)
    assert torch.allclose(found, expected, atol=1e-6) and torch.ops.dither.packed_matmul.default in targets


def test_gradients_of_inputs_go_through_decoded_weights() -> None:
    held = layer(Int(4) @ group(32))
    x = torch.randn(3, 64, device=DEVICE, requires_grad=True)
    held(x).sum().backward()
    assert x.grad is not None and torch.allclose(x.grad, held.weight.sum(0).expand(3, -1), atol=1e-5)


def test_without_triton_layers_decode_and_a_line_says_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from dither.kernels.gpu import presence

    monkeypatch.setattr(presence, "_installed", lambda: False)
    presence.has_triton.cache_clear()
    try:
        assert not presence.has_triton() and not presence.has_triton()
        assert [r.message for r in caplog.records if "triton" in r.message] == [caplog.records[0].message]
        with pytest.raises(RuntimeError, match="pip install triton"):
            presence.check_device("packed_matmul", torch.zeros(1, device=DEVICE))
    finally:
        presence.has_triton.cache_clear()
