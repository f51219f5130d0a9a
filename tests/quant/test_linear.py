"""Run-time modules: what they compute, what they store, and what they keep decoded for a while."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dither.errors import CheckpointError
from dither.formats import MXFP4, Float, Int, QTensor, Scheme, channel, group, tile
from dither.quant.linear import QuantEmbedding, QuantLinear, QuantWeight, SharedLinear, attach, decoded, share

SCHEMES = [
    Int(4) @ group(16),
    Int(3, sym=True) @ channel(),
    Int(4, zero="float") @ group(20),
    MXFP4,
    Float(2, 1, scale="e4m3") @ group(16),
]
TYPES = [torch.float32, torch.bfloat16, torch.float16]
DECODES = SCHEMES[2]  # zero points that are no integers: no kernel multiplies its codes
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # of sums in another order, relative to what is summed


def quantized(scheme: Scheme, rows: int = 24, columns: int = 40, seed: int = 0) -> QTensor:
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    params = scheme.fit(w)
    return QTensor.from_codes(scheme.encode(w, params), params, scheme)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", TYPES)
def test_linear_is_the_float_layer_of_the_decoded_weight(scheme: Scheme, dtype: torch.dtype) -> None:
    tensor, x, bias = quantized(scheme), torch.randn(3, 5, 40).to(dtype), torch.randn(24)
    layer = QuantLinear.replace(tensor, bias)
    weight = tensor.dequantize(dtype)
    expected = nn.functional.linear(x, weight, bias.to(dtype))
    size = nn.functional.linear(x.double().abs(), weight.double().abs(), bias.double().abs())
    assert bool(((layer(x).double() - expected.double()).abs() <= 2 * ROUNDING[dtype] * size).all())
    assert (layer._product is None) == (dtype == torch.float16 or not layer.multiplies_codes) and torch.equal(layer.weight, tensor.dequantize())
    with decoded(layer):
        assert torch.equal(layer(x), expected)
    assert set(layer.state_dict()) == {*tensor.tensors(), "bias"}


@pytest.mark.parametrize("scheme", [*SCHEMES, Int(4) @ tile(8, 8)], ids=str)
def test_embedding_rows(scheme: Scheme) -> None:
    tensor, index = quantized(scheme), torch.tensor([[3, 23, 3], [0, 7, 7]])
    layer = QuantEmbedding(scheme, 24, 40, tensors=tensor.tensors(), dtype=torch.bfloat16)
    assert torch.equal(layer(index), tensor.dequantize(torch.bfloat16)[index])


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_moves_between_types_change_nothing_stored(scheme: Scheme) -> None:
    tensor = quantized(scheme)
    model = nn.Sequential(
        QuantEmbedding(scheme, 24, 40, tensors=tensor.tensors()), QuantLinear.replace(tensor, torch.ones(24))
    )
    before = {k: v.clone() for k, v in model.state_dict().items() if not k.endswith("bias")}
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        model.to(dtype)
        assert model[1].bias.dtype == dtype == model[0].weight.dtype == model(torch.tensor([1, 2])).dtype
        after = model.state_dict()
        assert all(after[k].dtype == v.dtype and torch.equal(after[k], v) for k, v in before.items())
    model.double()
    assert model(torch.tensor([1, 2])).dtype == torch.float64


class Stack(nn.Module):
    """Three matrices stored as ``[E, I, O]``."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 40, 8))
        self.v = nn.Parameter(torch.randn(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("ni,eio->neo", x, self.w)


def test_attached_parameters_are_read_as_they_were_stored() -> None:
    scheme, stack = Int(4) @ group(20), Stack()
    tensor = quantized(scheme)
    attach(stack, "w", QuantWeight.of(tensor), (3, 40, 8), swapped=True)
    assert torch.equal(stack.w, tensor.dequantize().view(3, 8, 40).transpose(1, 2))
    assert set(stack.state_dict()) == {"v", *(f"w_quantized.{k}" for k in tensor.tensors())}
    assert stack.half().w.dtype == torch.float16 and stack.float().w.dtype == torch.float32
    assert torch.equal(copy.deepcopy(stack).w, stack.w) and isinstance(stack, Stack)
    with pytest.raises(ValueError, match="no parameter 'u'"):
        attach(stack, "u", QuantWeight.of(tensor), (24, 40))


def counted(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Every decoding from now on."""
    calls: list[torch.dtype] = []
    inner = QTensor.dequantize

    def dequantize(self: QTensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        calls.append(dtype)
        return inner(self, dtype)

    monkeypatch.setattr(QTensor, "dequantize", dequantize)
    return calls


def two(scheme: Scheme = SCHEMES[0]) -> nn.Sequential:
    return nn.Sequential(
        QuantLinear.replace(quantized(scheme), None), QuantLinear.replace(quantized(scheme, 16, 24), torch.ones(16))
    )


@pytest.mark.parametrize("dtype", TYPES)
def test_decoded_decodes_once_and_computes_the_same(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    model, x = two(DECODES), torch.randn(12, 40).to(dtype)
    calls, expected = counted(monkeypatch), model(x)
    assert len(calls) == 2
    with decoded(model):
        for _ in range(3):
            assert torch.equal(model(x), expected)
        assert len(calls) == 4
        with decoded(model):
            model(x)
        model(x)
        assert len(calls) == 4  # the outer one decides
    assert torch.equal(model(x), expected) and len(calls) == 6
    assert all(m._kept is None for m in model)


def test_decoded_stays_within_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = two(DECODES), torch.randn(12, 40)
    with decoded(model, 4 * 24 * 40):  # the first layer alone
        model(x)
        calls = counted(monkeypatch)
        model(x)
        assert len(calls) == 1 and sum(m._kept is not None for m in model) == 1
    with decoded(model, 0):
        model(x)
        assert all(m._kept is None for m in model)


def test_decoded_follows_types_and_ends_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = two(), torch.randn(2, 40)
    with pytest.raises(RuntimeError), decoded(model):
        model(x)
        assert torch.equal(
            model[0](x.bfloat16()), nn.functional.linear(x.bfloat16(), model[0].dequantize(torch.bfloat16))
        )
        assert model[0](x).dtype == torch.float32
        model.half()
        assert all(m._kept is None for m in model)
        raise RuntimeError
    assert not any(m._keeps for m in model)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_rows_meet_the_codes_themselves(scheme: Scheme, dtype: torch.dtype) -> None:
    layer, x = QuantLinear.replace(quantized(scheme), torch.randn(24)), torch.randn(3, 2, 40, dtype=dtype)
    weight, bias = layer.dequantize(torch.float32), layer.bias.to(dtype).float()
    expected = nn.functional.linear(x.float(), weight, bias)
    found = layer(x)
    size = float(nn.functional.linear(x.float().abs(), weight.abs()).max())
    assert found.dtype == dtype and float((found.float() - expected).abs().max()) <= (1e-5 if dtype == torch.float32 else 2e-2) * size
    assert (layer._product is not None) == layer.multiplies_codes
    many = torch.cat([x.reshape(6, 40), x.reshape(6, 40).flip(0)])  # by the kernel of many rows
    assert float((layer(many)[:6].float() - expected.view(6, 24)).abs().max()) <= (1e-5 if dtype == torch.float32 else 2e-2) * size
    x.requires_grad_()
    assert torch.autograd.grad(layer(x).float().sum(), x)[0].isfinite().all()  # decoded, where a gradient is wanted
    if layer.multiplies_codes:  # what is loaded afterwards is what is multiplied
        other = QuantLinear.replace(quantized(scheme, seed=1), torch.zeros(24))
        layer.load_state_dict(other.state_dict())
        with torch.no_grad():
            assert torch.equal(layer(x), other(x))


class Tied(nn.Module):
    """An embedding and a head on one matrix, as transformers' models tell of it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(24, 40), nn.Linear(40, 24)
        self.all_tied_weights_keys = {"head.weight": "embed.weight"}


def test_a_shared_head_reads_the_embedding(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, index = Tied(), torch.randn(2, 40), torch.tensor([1, 5])
    share(model)
    assert type(model.head) is nn.Linear and model.all_tied_weights_keys  # float: nothing to do
    bias, tensor = model.head.bias.detach().clone(), quantized(SCHEMES[0])
    model.embed = QuantEmbedding(tensor.scheme, 24, 40, tensors=tensor.tensors())
    share(model)
    assert isinstance(model.head, SharedLinear) and not model.all_tied_weights_keys
    expected = nn.functional.linear(x, tensor.dequantize(), bias)
    torch.testing.assert_close(model.head(x), expected, rtol=1e-4, atol=1e-4)  # by the codes: sums in another order
    assert torch.equal(model.head.weight, model.embed.weight)
    many = torch.randn(9, 40)
    torch.testing.assert_close(model.head(many), nn.functional.linear(many, tensor.dequantize(), bias), rtol=1e-4, atol=1e-4)
    assert set(model.state_dict()) == {"head.bias", *(f"embed.{k}" for k in tensor.tensors())}
    twin = copy.deepcopy(model)
    assert twin.head.embedding is twin.embed
    with decoded(model):
        calls = counted(monkeypatch)
        for _ in range(3):
            assert torch.equal(model.head(x), expected)
            assert torch.equal(model.embed(index), model.embed.weight[index])
        assert len(calls) == 1


def test_check_names_what_is_wrong() -> None:
    layer = QuantLinear.replace(quantized(SCHEMES[0]), None)
    layer.check()
    layer.scale[0, 0] = float("inf")
    with pytest.raises(CheckpointError, match="scale: holds NaN or inf"):
        layer.check()
    layer.scale = layer.scale.float().nan_to_num(posinf=1.0)
    with pytest.raises(CheckpointError, match=r"scale: is torch\.float32"):
        layer.check()
    layer.restore_types()
    layer.check()
    layer.codes = layer.codes.to(torch.int32)
    layer.restore_types()
    with pytest.raises(CheckpointError, match=r"codes: is torch\.int32"):
        layer.check()
