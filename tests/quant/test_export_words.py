"""The layouts of GPTQ and AWQ, against decoders that are written here from their published definitions, one number at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import dither
import tiny_bytes
from dither.errors import ExportError
from dither.formats import Float, Int, QTensor, Scheme, channel, group
from dither.quant.export import awq_layout, gptq_layout

TOKENS = torch.arange(3, 131).view(4, 32)
Words = npt.NDArray[np.int64]


def few_bit(scheme: Scheme, rows: int, columns: int) -> QTensor:
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    w[0] = w[0].abs()  # a row whose zero points are 0
    params = scheme.fit(w)
    return QTensor.from_codes(scheme.encode(w, params), params, scheme)


def bit_stream(words: Words, bits: int) -> list[int]:
    """Numbers of ``bits`` bits in 32-bit words, least significant first, across words."""
    whole = sum((int(word) & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
    return [(whole >> (bits * i)) & ((1 << bits) - 1) for i in range(32 * len(words) // bits)]


def gptq_decoder(stored: dict[str, torch.Tensor], bits: int, version: int) -> torch.Tensor:
    """w[o, i] = scales[g, o] (q - z)."""
    qweight, qzeros = stored["qweight"].numpy().astype(np.int64), stored["qzeros"].numpy().astype(np.int64)
    scales, g_idx = stored["scales"].float().numpy(), stored["g_idx"].numpy()
    outputs = scales.shape[1]
    found = np.zeros((outputs, len(g_idx)), np.float32)
    for o in range(outputs):
        codes = bit_stream(qweight[:, o], bits)
        for i, g in enumerate(g_idx):
            zero = bit_stream(qzeros[g], bits)[o] + (1 if version == 1 else 0)
            found[o, i] = scales[g, o] * np.float32(codes[i] - zero)
    return torch.from_numpy(found)


def awq_decoder(stored: dict[str, torch.Tensor], size: int) -> torch.Tensor:
    qweight, qzeros = stored["qweight"].numpy().astype(np.int64), stored["qzeros"].numpy().astype(np.int64)
    scales = stored["scales"].float().numpy()
    inputs, outputs = qweight.shape[0], scales.shape[1]
    shift = {0: 0, 1: 16, 2: 4, 3: 20, 4: 8, 5: 24, 6: 12, 7: 28}  # of output o % 8 in its word
    found = np.zeros((outputs, inputs), np.float32)
    for o in range(outputs):
        for i in range(inputs):
            g = i // size
            code, zero = ((int(w[o // 8]) >> shift[o % 8]) & 15 for w in (qweight[i], qzeros[g]))
            found[o, i] = scales[g, o] * np.float32(code - zero)
    return torch.from_numpy(found)


@pytest.mark.parametrize("fmt", [*(Int(bits) for bits in range(1, 9)), Int(4, sym=True), Int(3, sym="full"), Int(8, sym="extremum")], ids=str)
@pytest.mark.parametrize("size", [16, 32, -1])
def test_gptq_words_decode_to_our_values(fmt: Int, size: int) -> None:
    tensor = few_bit(fmt @ group(size), 32, 64)
    bits = gptq_layout.width(tensor.grid.format.bits)
    assert torch.equal(gptq_decoder(gptq_layout.packed(tensor, as_is=True), bits, 2), tensor.dequantize())
    if fmt.sym:  # no zero point is 0
        assert torch.equal(gptq_decoder(gptq_layout.packed(tensor, as_is=False), bits, 1), tensor.dequantize())


@pytest.mark.parametrize("fmt", [*(Int(bits) for bits in range(1, 5)), Int(4, sym=True), Int(3, sym="full")], ids=str)
@pytest.mark.parametrize("size", [16, 32, -1])
def test_awq_words_decode_to_our_values(fmt: Int, size: int) -> None:
    tensor = few_bit(fmt @ group(size), 24, 64)
    assert torch.equal(awq_decoder(awq_layout.packed(tensor), 64 if size == -1 else size), tensor.dequantize())


# -- whole models --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("words")
    tiny_bytes.save(found / "float")
    return found


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    found: torch.Tensor = model(TOKENS, use_cache=False).logits
    return found


def decoded(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The float model with the weights of an exported folder, decoded as its own config says."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    plain = AutoConfig.from_pretrained(folder)
    del plain.quantization_config
    model = AutoModelForCausalLM.from_config(plain).eval()
    stored = load_file(folder / "model.safetensors")
    for name in [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]:
        own = {key: stored.pop(f"{name}.{key}") for key in ("qweight", "qzeros", "scales", "g_idx") if f"{name}.{key}" in stored}
        size = config["group_size"] if config["group_size"] > 0 else own["qweight"].shape[0]
        if config["quant_method"] == "gptq":
            stored[f"{name}.weight"] = gptq_decoder(own, config["bits"], {"gptq": 1, "gptq_v2": 2}[config["checkpoint_format"]])
        else:
            stored[f"{name}.weight"] = awq_decoder(own, size)
    missing, unexpected = model.load_state_dict(stored, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model, config


@pytest.mark.parametrize(
    ("to", "knobs", "says"),
    [
        ("gptq", {"bits": 4, "group": 32}, {"bits": 4, "group_size": 32, "sym": False, "desc_act": False}),
        ("gptq", {"bits": 3, "group": 32, "sym": True}, {"bits": 3, "group_size": 32, "sym": True, "checkpoint_format": "gptq"}),
        ("gptq", {"bits": 8, "group": None, "sym": True}, {"bits": 8, "group_size": -1, "sym": True}),
        ("awq", {"bits": 4, "group": 32}, {"bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}),
        ("awq", {"bits": 3, "group": None, "sym": True, "skip": ("*layers.1.*",)}, {"bits": 4, "group_size": -1}),
    ],
)
def test_exported_folders_give_our_logits_to_the_last_bit(root: Path, tmp_path: Path, to: str, knobs: dict[str, Any], says: dict[str, Any]) -> None:
    dither.quantize(root / "float", dither.recipes.RTN(**knobs), TOKENS, tmp_path / "out")
    dither.export(tmp_path / "out", tmp_path / to, to=to)
    model, config = decoded(tmp_path / to)
    assert config.items() >= says.items() and config["quant_method"] == to
    assert torch.equal(logits(model), logits(dither.load(tmp_path / "out")[0]))
    assert (tmp_path / to / "tokenizer.json").is_file()
    if to == "awq":
        assert len(config["modules_to_not_convert"]) == (8 if "skip" in knobs else 1)


def test_float_layers_are_named(root: Path, tmp_path: Path) -> None:
    dither.quantize(root / "float", dither.recipes.RTN(bits=4, group=32, sym=True, skip=("*0.mlp.up_proj",)), TOKENS, tmp_path / "out")
    notes = dither.export(tmp_path / "out", tmp_path / "gptq", to="gptq")
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    assert list(config["dynamic"]) == [r"-:^model\.layers\.0\.mlp\.up_proj$"] and "1 Linear layers are float" in notes[0]


@pytest.mark.parametrize(
    ("to", "knobs", "message"),
    [
        ("gptq", {"weights": Float(4, 3) @ channel()}, r"no integer format.*compressed-tensors can"),
        ("gptq", {"bits": 4, "group": 64}, r"down_proj\.weight \(its last group is ragged.*gguf and onnx can"),
        ("gptq", {"bits": 4, "group": 32, "overrides": {"*o_proj": Int(8) @ group(32)}}, r"o_proj\.weight \(int8 .* is not the scheme of most"),
        ("gptq", {"weights": Int(4, scale="bfloat16") @ group(32)}, "scales are bfloat16, not float16"),
        ("awq", {"bits": 5, "group": 32}, "it has 5 bits, not 4.*gptq"),
        ("awq", {"bits": 4, "group": 32, "overrides": {"*o_proj": Int(4) @ group(16)}}, "is not the scheme of most"),
    ],
)
def test_refusals(root: Path, tmp_path: Path, to: str, knobs: dict[str, Any], message: str) -> None:
    dither.quantize(root / "float", dither.recipes.RTN(**knobs), TOKENS, tmp_path / "out")
    with pytest.raises(ExportError, match=message) as error:
        dither.export(tmp_path / "out", tmp_path / "x", to=to)
    assert "\n" not in str(error.value) and not (tmp_path / "x").exists()
    few = "is not the scheme" in message
    assert ("--nearest would write 2 weights as int4" if few else "--nearest would write 14 weights as int") in str(error.value)


@pytest.mark.parametrize(("to", "bits"), [("gptq", 8), ("awq", 4)])
def test_nearest_takes_one_scheme_for_all(root: Path, tmp_path: Path, to: str, bits: int) -> None:
    dither.quantize(root / "float", dither.recipes.RTN(bits=4, group=64), TOKENS, tmp_path / "out")
    notes = dither.export(tmp_path / "out", tmp_path / "x", to=to, nearest=True)
    model, config = decoded(tmp_path / "x")
    assert (config["bits"], config["group_size"]) == (bits, 32) and notes[0].startswith(f"re-encoded 14 weights as int{bits} asymmetric group(32)")
    ours, theirs = logits(dither.load(tmp_path / "out")[0]), logits(model)
    assert 0 < float((ours - theirs).norm() / ours.norm()) < (0.02 if bits == 8 else 0.3)
