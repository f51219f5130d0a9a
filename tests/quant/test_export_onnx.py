"""ONNX: onnxruntime decodes our weights, and gives our logits up to the order of sums in float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import dither
import tiny_bytes
import tiny_models
from dither.errors import ExportError
from dither.formats import Float, Format, Int, QTensor, Scheme, channel, group
from dither.quant.export import onnx as target

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
runtime = pytest.importorskip("onnxruntime")

TOKENS = torch.arange(3, 131).view(4, 32)


def session(model: Any) -> Any:
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


FORMATS: list[Format] = [*(Int(bits) for bits in range(1, 9)), Int(4, sym=True), Int(2, sym="full"), Int(8, sym="extremum"), Int(4, scale="bfloat16")]


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize(("columns", "size"), [(64, 16), (64, 32), (144, 48), (160, 128), (96, -1), (72, -1), (33, -1)])
def test_the_node_decodes_to_our_values(fmt: Format, columns: int, size: int) -> None:
    """The node on the unit matrix is the weight itself: each sum has one term, so it is exact."""
    from onnx import TensorProto, helper, numpy_helper

    scheme: Scheme = fmt @ group(size)
    w = torch.randn(12, columns, generator=torch.Generator().manual_seed(columns))
    params = scheme.fit(w)
    tensor = QTensor.from_codes(scheme.encode(w, params), params, scheme)
    inputs = {name: value.numpy() for name, value in target.packed(tensor).items()}
    assert ("zero_points" in inputs) == (not (bool(fmt.sym) and fmt.bits in (4, 8)))  # type: ignore[attr-defined]
    node = helper.make_node(
        "MatMulNBits", ["x", *inputs], ["y"], domain="com.microsoft",
        K=columns, N=12, bits=target.width(scheme), block_size=target.block(scheme, columns), accuracy_level=1,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [columns, columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [columns, 12])],
        [numpy_helper.from_array(value, name) for name, value in inputs.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)], ir_version=10)
    (y,) = session(model.SerializeToString()).run(None, {"x": np.eye(columns, dtype=np.float32)})
    assert np.allclose(y.T, tensor.dequantize().numpy(), rtol=2**-22, atol=float(params["scale"].abs().max()) * 2**-19)


@torch.no_grad()
def logits(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model(tokens, use_cache=False).logits
    return found


CASES: dict[str, dict[str, Any]] = {
    "asym4": {"bits": 4, "group": 32},
    "sym4-and-8": {"bits": 4, "group": 64, "sym": True, "overrides": {"*down_proj": Int(8) @ channel()}, "skip": ("*layers.1.mlp.up_proj",)},
}


@pytest.mark.parametrize("name", CASES)
def test_onnxruntime_gives_our_logits(tmp_path: Path, name: str) -> None:
    tiny_bytes.save(tmp_path / "float")
    dither.quantize(tmp_path / "float", dither.recipes.RTN(**CASES[name]), TOKENS, tmp_path / "out")
    notes = dither.export(tmp_path / "out", tmp_path / "onnx", to="onnx")
    assert "no cache" in notes[0]
    ours, there = dither.load(tmp_path / "out")[0], session(str(tmp_path / "onnx" / "model.onnx"))
    for tokens in (TOKENS, TOKENS[:1, :2], TOKENS[:3, :7]):  # sizes that were not traced
        (theirs,) = there.run(None, {"input_ids": tokens.numpy()})
        exact = logits(ours, tokens)
        assert theirs.shape == exact.shape
        assert float((torch.from_numpy(theirs) - exact).abs().max()) < 1e-5 * float(exact.abs().max())
    assert (tmp_path / "onnx" / "tokenizer.json").is_file()
    assert "quantization_config" not in json.loads((tmp_path / "onnx" / "config.json").read_text())


def test_layers_that_store_their_weights_transposed(tmp_path: Path) -> None:
    tiny_models.build("gpt2")[0].save_pretrained(tmp_path / "float")
    dither.quantize(tmp_path / "float", dither.recipes.RTN(bits=4, group=16), TOKENS % 96, tmp_path / "out")
    dither.export(tmp_path / "out", tmp_path / "onnx", to="onnx")
    (theirs,) = session(str(tmp_path / "onnx" / "model.onnx")).run(None, {"input_ids": TOKENS.numpy() % 96})
    exact = logits(dither.load(tmp_path / "out")[0], TOKENS % 96)
    assert float((torch.from_numpy(theirs) - exact).abs().max()) < 1e-5 * float(exact.abs().max())


def test_models_of_images(tmp_path: Path) -> None:
    config: Any = dither.load_float("vit-fashion")[0].config
    images = torch.randn(3, config.num_channels, config.image_size, config.image_size)
    dither.quantize("vit-fashion", dither.recipes.RTN(bits=8, group=None), images, tmp_path / "out")
    assert dither.export(tmp_path / "out", tmp_path / "onnx", to="onnx") == []
    (theirs,) = session(str(tmp_path / "onnx" / "model.onnx")).run(None, {"pixel_values": images.numpy()})
    with torch.no_grad():
        exact = dither.load(tmp_path / "out", dtype=torch.float32)[0](images).logits
    assert float((torch.from_numpy(theirs) - exact).abs().max()) < 1e-5 * float(exact.abs().max())


@pytest.mark.parametrize(
    ("name", "knobs", "message"),
    [
        ("llama", {"weights": Float(4, 3) @ channel()}, r"no integer format.*compressed-tensors can; --nearest would write 14 weights as int8"),
        ("llama", {"bits": 4, "group": 24}, r"groups of 24 are not whole blocks of 16"),
        ("mixtral", {"bits": 4, "group": 16}, r"experts\.gate_up_proj \(a parameter, not a Linear"),
    ],
)
def test_refusals(tmp_path: Path, name: str, knobs: dict[str, Any], message: str) -> None:
    tiny_models.build(name)[0].save_pretrained(tmp_path / "float")
    dither.quantize(tmp_path / "float", dither.recipes.RTN(**knobs), TOKENS % 96, tmp_path / "out")
    with pytest.raises(ExportError, match=message):
        dither.export(tmp_path / "out", tmp_path / "x", to="onnx")
    assert not (tmp_path / "x").exists()


def test_nearest(tmp_path: Path) -> None:
    tiny_bytes.save(tmp_path / "float")
    dither.quantize(tmp_path / "float", dither.recipes.RTN(weights=Float(3, 2) @ group(16)), TOKENS, tmp_path / "out")
    notes = dither.export(tmp_path / "out", tmp_path / "onnx", to="onnx", nearest=True)
    assert notes[0].startswith("re-encoded 14 weights as int8 asymmetric group(32), int8 asymmetric group(64): relative squared error")
    (theirs,) = session(str(tmp_path / "onnx" / "model.onnx")).run(None, {"input_ids": TOKENS.numpy()})
    exact = logits(dither.load(tmp_path / "out")[0], TOKENS)
    assert 1e-6 < float((torch.from_numpy(theirs) - exact).norm() / exact.norm()) < 2e-2
