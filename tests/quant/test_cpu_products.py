"""Layers that multiply what is stored: against float64 with the decoded weight, and whole models against themselves without kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dither
import tiny_folder
import tiny_models
from dither.formats import (
    MXFP4,
    NVFP4,
    Codebook,
    Float,
    Int,
    PartialBinary,
    QTensor,
    Scheme,
    WeightScheme,
    channel,
    group,
    tensor,
    tile,
)
from dither.kernels.extension import extension
from dither.quant.cpu_products import FEW_ROWS, cpu_kind
from dither.quant.linear import QuantLinear

if extension() is None:
    pytest.skip("the C++ extension is not installed", allow_module_level=True)

FLOATS = [
    Float(2, 1) @ group(32),
    Float(2, 1, scale="bfloat16") @ group(20),  # ragged, and no multiple of anything
    Float(2, 1, scale="float32") @ channel(),
    MXFP4,
    NVFP4,
    Float(4, 3) @ group(128),
    Float(4, 3) @ channel(),
    Float(4, 3, nan=False) @ tensor(),
    Float(5, 2, finite=False) @ group(64),
    Float(3, 2) @ group(16),
    Float(2, 3, scale="e8m0") @ group(24),
    Float(1, 1) @ group(8),
    Float(1, 0) @ group(16),
    Float(3, 3) @ tile(8, 32),
    Float(1, 6, nan=False, scale="e4m3") @ tensor(),
    Float(7, 0, nan=False) @ channel(),
]
PARTIAL = [
    PartialBinary(0.1),
    PartialBinary(0.3, mask="flat"),
    PartialBinary(0.95, high_bits=5),
    PartialBinary(0.05, high_bits=2),
    PartialBinary(0.0),
    PartialBinary(1.0),
]
BOOKS = [
    Codebook(4, 256),
    Codebook(4, 256, 16),
    Codebook(3, 64, 32, groups=3),
    Codebook(8, 4096),
    Codebook(8, 256, outlier_percent=5.0, outlier=(4, 16)),
    Codebook(2, 16, 4, groups=2, outlier_percent=3.0, outlier=(3, 64), norm=True),
    Codebook(12, 128),
]
ALL = [*FLOATS, *PARTIAL, *BOOKS]
SHAPES = [(24, 40), (37, 257), (16, 576)]


def matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def stored(scheme: WeightScheme, rows: int, columns: int) -> QTensor:
    """A random matrix in that storage."""
    w = matrix(rows, columns)
    if isinstance(scheme, PartialBinary):
        return partial(scheme, w)
    if isinstance(scheme, Codebook):
        return codebook(scheme, rows, columns)
    assert isinstance(scheme, Scheme)
    params = scheme.fit(w)
    return QTensor.from_codes(scheme.encode(w, params), params, scheme)


def partial(scheme: PartialBinary, w: Tensor) -> QTensor:
    binary, groups = scheme.choose(w.abs()), w.shape[1] // scheme.width(w.shape[1])
    g = torch.Generator().manual_seed(1)
    wide = torch.randint(0, 1 << scheme.high_bits, w.shape, generator=g)
    codes = torch.where(binary, (w > 0).long(), wide).to(torch.uint8)
    zero = torch.randint(0, 1 << scheme.high_bits, (len(w),), generator=g)
    alpha, mu = torch.rand(len(w), groups, generator=g) + 0.5, torch.randn(len(w), groups, generator=g) / 10
    return scheme.pack(binary, codes, alpha, mu, torch.rand(len(w), generator=g) / 50 + 0.01, zero)


def codebook(scheme: Codebook, rows: int, columns: int) -> QTensor:
    g, count = torch.Generator().manual_seed(1), scheme.outliers(columns)
    own = torch.randperm(columns, generator=g)[:count].sort().values
    groups = torch.arange(columns - count) % scheme.groups
    v0, k0 = scheme.outlier

    def book(*size: int) -> Tensor:
        return torch.randn(*size, generator=g)

    packed = scheme.pack(
        torch.randint(0, 1 << scheme.index_bits, (-(-rows // scheme.vector), columns - count), generator=g, dtype=torch.int32),
        book(scheme.groups, scheme.centroids, scheme.vector), (rows, columns),
        residuals=None if scheme.residual is None else book(scheme.groups, scheme.residual, scheme.vector), groups=groups, outlier_columns=own,
        outlier_codes=torch.randint(0, k0, (-(-rows // v0), count), generator=g, dtype=torch.int32), outlier_centroids=book(k0, v0),
        affine=(book(columns), book(columns)) if scheme.norm else None,
    )
    return QTensor.from_tensors(packed, scheme, (rows, columns))


@pytest.fixture(params=("scalar", "avx2", "avx512"))
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("DITHER_ISA", request.param)
    try:
        extension().isa(request.param)  # type: ignore[union-attr]
    except ValueError as error:
        pytest.skip(str(error))
    return str(request.param)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scheme", ALL, ids=str)
def test_layers_against_float64(isa: str, scheme: WeightScheme, shape: tuple[int, int]) -> None:
    held, bias = stored(scheme, *shape), torch.randn(shape[0])
    layer = QuantLinear.replace(held, bias)
    weight = held.dequantize(torch.float32).double()
    assert layer.multiplies_codes
    for dtype, limit in ((torch.float32, 2.0**-17), (torch.bfloat16, 2.0**-7)):  # x as two bfloat16; y and its sum with the bias rounded
        x = matrix(3, shape[1], seed=1).to(dtype)
        with torch.no_grad():
            found = layer(x.view(3, 1, -1))
        assert layer._product is not None and found.dtype == dtype and found.shape == (3, 1, shape[0])
        expected = x.double() @ weight.T + bias.to(dtype).double()
        size = x.double().abs() @ weight.abs().T + bias.double().abs()
        assert bool(((found[:, 0].double() - expected).abs() <= limit * size).all())


@pytest.mark.parametrize("scheme", ALL, ids=str)
def test_a_row_is_the_same_alone_beside_others_and_on_more_threads(isa: str, scheme: WeightScheme) -> None:
    layer, x = QuantLinear.replace(stored(scheme, 37, 257), None), matrix(FEW_ROWS, 257, seed=1)
    threads = torch.get_num_threads()
    for given in (x, x.bfloat16()):
        with torch.no_grad():
            every = layer(given)
            assert all(torch.equal(layer(given[t : t + 1])[0], every[t]) for t in range(FEW_ROWS))
            assert torch.equal(layer(given[2:5]), every[2:5])
            torch.set_num_threads(threads + 2)
            assert torch.equal(layer(given), every)
            torch.set_num_threads(threads)


@pytest.mark.parametrize("scheme", ALL, ids=str)
def test_what_is_loaded_later_is_what_is_multiplied(scheme: WeightScheme) -> None:
    layer, x = QuantLinear.replace(stored(scheme, 24, 96), None), matrix(2, 96, seed=1)
    other = stored(scheme, 24, 96)
    name = "codes" if "codes" in other.stored else "signs"
    flipped = other.stored[name].flip(0).contiguous()
    with torch.no_grad():
        first = layer(x)
        layer.load_state_dict({**other.tensors(), name: flipped})
        assert not torch.equal(layer(x), first)
        weight = layer.dequantize(torch.float32).double()
        torch.testing.assert_close(layer(x).double(), x.double() @ weight.T, rtol=1e-4, atol=1e-4 * float(weight.abs().max()))


RECIPES: dict[str, Any] = {
    "fp4": dither.recipes.RTN(format="fp4", group=16),
    "fp8": dither.recipes.RTN(format="fp8", group=None),
    "mxfp4": dither.recipes.RTN(format="mxfp4"),
    "nvfp4": dither.recipes.RTN(format="nvfp4"),
    "vptq": dither.recipes.VPTQ(bits=3, vector_len=2, kmeans_iters=5),
    "vptq outliers": dither.recipes.VPTQ(vector_len=2, kmeans_iters=5, outlier_percent=5.0, outlier=(2, 64), norm=True),
    "pb-llm": dither.recipes.PBLLM(salient=0.2),
}
TOKENS = torch.arange(3, 67).view(4, 16)


def margins(model: nn.Module, ids: Tensor, start: int) -> Tensor:
    """By how much the best token leads, behind each position from ``start - 1`` on, over the spread of its logits."""
    with torch.no_grad():
        logits = model(ids[None], use_cache=False).logits[0, start - 1 : -1].double()
    best = logits.topk(2, dim=-1).values
    return (best[:, 0] - best[:, 1]) / logits.std(-1)


@pytest.mark.parametrize("name", RECIPES)
def test_a_checkpoint_writes_the_same_text_with_and_without_kernels(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = tiny_models.build("llama")
    for parameter in model.parameters():
        parameter.data *= 2
    model.save_pretrained(tmp_path / "float")
    tiny_folder.tokenizer().save_pretrained(tmp_path / "float")
    dither.quantize(tmp_path / "float", RECIPES[name], TOKENS, tmp_path / "out")
    ids, texts = torch.tensor([[5, 17, 9, 40]]), []
    for path in ("", "reference"):
        monkeypatch.setenv("DITHER_KERNELS", path)
        loaded, _ = dither.load(tmp_path / "out", dtype=torch.float32)
        layers = [m for m in loaded.modules() if isinstance(m, QuantLinear)]
        texts.append(loaded.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, eos_token_id=None)[0])
        assert layers and all((m._product is not None) == (not path) for m in layers)
    sure = margins(loaded, texts[1], ids.shape[1]) > 1e-3
    clear = int(sure.cumprod(0).sum())  # tokens up to the first near tie
    assert clear >= 8
    assert torch.equal(texts[0][: ids.shape[1] + clear], texts[1][: ids.shape[1] + clear])


def test_what_has_no_kernel() -> None:
    from dither.formats import Int

    assert cpu_kind(Int(4, zero="float") @ group(20), None, 40) is None
    assert cpu_kind(Int(4) @ tile(8, 8), None, 40) is None


# -- traced ------------------------------------------------------------------------------------------------------------------


def seen_by_torch(held: nn.Module, x: Tensor) -> tuple[Tensor, set[object]]:
    """The result of the compiled module, and the operations that torch saw."""
    targets: set[object] = set()

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        targets.update(node.target for node in graph.graph.nodes)
        return graph.forward

    with torch.no_grad():
        return torch.compile(held, fullgraph=True, backend=keep)(x), targets


TRACED = [Float(2, 1) @ group(32), NVFP4, Int(3) @ group(24), PARTIAL[0], BOOKS[5]]


def layer(scheme: WeightScheme) -> QuantLinear:
    held = stored(scheme, 24, 72)
    return QuantLinear(scheme, 72, 24, torch.randn(24, generator=torch.Generator().manual_seed(3)), held.tensors())


@pytest.mark.parametrize("scheme", TRACED, ids=str)
def test_layers_are_compiled_and_exported_whole(scheme: WeightScheme) -> None:
    held, operation = layer(scheme), torch.ops.dither.stored_matmul.default
    x = matrix(3, held.in_features, seed=2)
    found, targets = seen_by_torch(held, x)
    assert torch.equal(found, held(x)) and operation in targets
    with torch.no_grad():
        exported = torch.export.export(held, (x,))
        assert torch.equal(exported.module()(x), held(x))
    assert any(node.target is operation for node in exported.graph.nodes)


def test_the_operation_is_what_torch_expects() -> None:
    held = layer(Codebook(4, 256))
    stored = dict(held.named_buffers(recurse=False))
    arguments = (matrix(3, held.in_features), list(stored.values()), ",".join(stored), held._record, held.out_features)
    operation = torch.ops.dither.stored_matmul.default
    assert set(torch.library.opcheck(operation, arguments).values()) == {"SUCCESS"}
    with pytest.raises(RuntimeError, match="dither::stored_matmul has no gradient"):
        operation(arguments[0].requires_grad_(), *arguments[1:])
    half = operation(arguments[0].detach().half(), *arguments[1:])
    assert half.dtype == torch.float16 and torch.allclose(half.float(), operation(arguments[0].detach(), *arguments[1:]), rtol=1e-2, atol=0.1)


def test_what_changes_in_the_weights_changes_the_traced_product() -> None:
    held = layer(Float(2, 1) @ group(32))
    held.bias = None
    x = matrix(3, held.in_features, seed=2)
    before, _ = seen_by_torch(held, x)
    held.get_buffer("scale").mul_(2)
    after, _ = seen_by_torch(held, x)
    assert torch.equal(after, 2 * before)
