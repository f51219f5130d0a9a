"""Exports: what the other program decodes is what we decode."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import dither
import tiny_folder
import tiny_models
from dither.errors import CheckpointError, ExportError, UsageError
from dither.formats import MXFP4, NVFP4, Float, Int, QTensor, Scheme, channel, group, tensor, tile
from dither.quant.export.compressed_tensors import as_read, group_of, packed
from dither.quant.linear import QuantWeight

TOKENS = torch.arange(3, 67).view(4, 16)


# -- the layout, against the package that defines it ----------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("sym", [False, "full"])
@pytest.mark.parametrize(("rows", "columns", "size"), [(8, 64, 16), (5, 33, 11), (37, 50, None), (1, 7, 7)])
def test_packed_tensors_are_what_compressed_tensors_packs(
    bits: int, sym: Any, rows: int, columns: int, size: int | None
) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    scheme = Int(bits, sym=sym) @ (channel() if size is None else group(size))
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(bits))
    params = scheme.fit(w)
    tensor = QTensor.from_codes(scheme.encode(w, params), params, scheme)
    ours = packed(tensor)
    strategy = {"strategy": "channel"} if size is None else {"strategy": "group", "group_size": size}
    args = QuantizationArgs(num_bits=bits, type="int", symmetric=bool(sym), **strategy)
    about = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    middle = 1 << (bits - 1)
    dense = {"weight": tensor.dequantize(), "weight_scale": tensor.stored["scale"]}
    if not sym:
        dense["weight_zero_point"] = (tensor.params["zero_point"] - middle).to(torch.int8)
    theirs = compressor.compress(dense, about)
    assert ours.keys() == {k for k in theirs if k != "weight"}
    for key in ours:
        assert torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype, key
    wide = ours | {"weight_scale": ours["weight_scale"].float()}  # it decodes in the type of the scales
    assert torch.equal(compressor.decompress(wide, about)["weight"], tensor.dequantize())


@pytest.mark.parametrize(
    ("scheme", "layout"),
    [(MXFP4, "mxfp4-pack-quantized"), (NVFP4, "nvfp4-pack-quantized"), (Float(4, 3, scale="float32") @ channel(), "float-quantized")],
)
def test_float_layouts_decode_to_what_we_decode(scheme: Scheme, layout: str) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    w = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    params = scheme.fit(w)
    held = QTensor.from_codes(scheme.encode(w, params), params, scheme)
    record = group_of(scheme, ["Linear"])
    about = QuantizationScheme(targets=["Linear"], weights=record["weights"])
    theirs = BaseCompressor.get_value_from_registry(layout).decompress(packed(held), about)["weight"].float()
    exact = held.dequantize()
    if layout.startswith("nvfp4"):  # it multiplies in bfloat16: scale / global scale, then the code
        assert ((theirs - exact).abs() <= 2**-7 * exact.abs()).all()
        own = packed(held)
        assert torch.allclose(own["weight_scale"].float() / own["weight_global_scale"], params["scale"] * params["global_scale"], rtol=2**-22, atol=0)
    else:
        assert torch.equal(theirs, exact)


# -- whole models ------------------------------------------------------------------------------------------------------------

ALONE = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "dither":
            raise ImportError("dither is blocked")

sys.meta_path.insert(0, Blocked())
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig
tokens, found, failed = torch.arange(3, 67).view(4, 16), {}, []
for job in sys.argv[2:]:
    folder, how = job.rsplit(":", 1)
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if how == "dequantize" else {}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **options)
        assert not info["missing_keys"] and not info["unexpected_keys"], info
    except Exception:
        found[job] = torch.zeros(0)
        continue
    with torch.no_grad():
        found[job] = model(tokens, use_cache=False).logits.contiguous()
save_file(found, sys.argv[1])
"""


def alone(answer: Path, *jobs: tuple[Path, str]) -> list[torch.Tensor]:
    """Logits of exported folders in a process that cannot import dither; empty where loading fails."""
    names = [f"{folder}:{how}" for folder, how in jobs]
    subprocess.run(
        [sys.executable, "-c", ALONE, answer, *names], check=True, capture_output=True, timeout=300, cwd=answer.parent
    )
    found = load_file(answer)
    return [found[name] for name in names]


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    found: torch.Tensor = model(TOKENS, use_cache=False).logits
    return found


def rounded(out: Path, dtype: torch.dtype) -> nn.Module:
    """The float model with our decoded weights rounded to ``dtype``."""
    held, model = dither.load(out)[0], tiny_models.build("llama")[0]
    for name, parameter in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        module = held.get_submodule(path)
        value = getattr(module, leaf).detach()
        parameter.data = value.to(dtype).float() if isinstance(module, QuantWeight) else value
    return model


CASES: dict[str, dict[str, Any]] = {
    "sym4": {"bits": 4, "group": 16, "sym": True},
    "sym3": {"bits": 3, "group": 16, "sym": "full"},
    "sym8-row": {"bits": 8, "group": None, "sym": "extremum"},
    "wide-group": {"bits": 4, "group": 64, "sym": True},  # more than a row holds
    "mixed": {
        "bits": 4,
        "group": 16,
        "sym": True,
        "overrides": {"*down_proj": Int(8, sym=True) @ group(24), "*k_proj": Int(2, sym="full") @ channel()},
    },
    "some-float": {"bits": 4, "group": 16, "sym": True, "skip": ("*layers.1.*", "lm_head")},
    "asym4": {"bits": 4, "group": 16},
    "asym3-row": {"bits": 3, "group": None},
    "fp8-row": {"weights": Float(4, 3) @ channel()},
    "fp8-tensor": {"weights": Float(4, 3, scale="float32") @ tensor()},
    "fp8-and-int": {"weights": Float(4, 3) @ group(16), "overrides": {"*down_proj": Int(4, sym=True) @ group(24)}},
    "mxfp4": {"weights": MXFP4, "skip": ("*down_proj", "lm_head")},
    "nvfp4": {"weights": NVFP4},
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every case: its checkpoint, its export, the notes."""
    root = tmp_path_factory.mktemp("export")
    tiny_models.build("llama")[0].save_pretrained(root / "float")
    found: dict[str, Any] = {"root": root}
    for name, knobs in CASES.items():
        result = dither.quantize(root / "float", dither.recipes.RTN(**knobs), TOKENS, root / name)
        found[name] = (root / name, root / f"{name}-ct", dither.export(result, root / f"{name}-ct"))
    jobs = [(found[name][1], how) for name in CASES for how in ("plain", "dequantize")]
    answers = alone(root / "answer.safetensors", *jobs)
    found["logits"] = {
        (folder.name.removesuffix("-ct"), how): a for (folder, how), a in zip(jobs, answers, strict=True)
    }
    return found


@pytest.mark.parametrize("name", [n for n in CASES if not n.startswith("asym") and n != "nvfp4"])
def test_symmetric_exports_give_the_same_logits_to_the_last_bit(exported: dict[str, Any], name: str) -> None:
    out, _, notes = exported[name]
    assert torch.equal(exported["logits"][name, "plain"], logits(dither.load(out)[0]))
    assert ("do not load with dequantize=True" in " ".join(notes)) == (len(group_count(exported[name][1])) > 1)


def group_count(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]


@pytest.mark.parametrize("name", ["asym4", "asym3-row", "sym4", "some-float", "fp8-row", "fp8-tensor", "mxfp4", "nvfp4"])
def test_dequantized_at_load_weights_are_rounded_once_to_the_type_of_the_scales(
    exported: dict[str, Any], name: str
) -> None:
    out = exported[name][0]
    exact = logits(dither.load(out)[0])
    scales = {"fp8-tensor": torch.float32, "mxfp4": torch.bfloat16, "nvfp4": torch.bfloat16}.get(name, torch.float16)
    for how in ("dequantize", *(["plain"] if name.startswith(("asym", "mx", "nv")) else [])):  # which the folder itself asks for
        found = exported["logits"][name, how]
        assert torch.equal(found, logits(rounded(out, scales))) or name == "nvfp4"
        assert (found - exact).abs().max() < (1e-2 if name == "nvfp4" else 1e-3) * exact.abs().max()


def test_exports_say_that_they_are_decoded(exported: dict[str, Any]) -> None:
    for name in ("asym4", "asym3-row", "mxfp4", "nvfp4"):
        assert "decodes them as it loads" in " ".join(exported[name][2])
    assert exported["sym4"][2] == exported["fp8-row"][2] == []


def test_config_and_files(exported: dict[str, Any]) -> None:
    folder = exported["some-float"][1]
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (
        set(config["ignore"]) == {"lm_head"} | {n for n in config["ignore"] if ".layers.1." in n}
        and len(config["ignore"]) == 8
    )
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert {f.name for f in folder.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}
    groups = group_count(exported["mixed"][1]).values()
    assert sorted((g["weights"]["num_bits"], g["weights"]["strategy"]) for g in groups) == [
        (2, "channel"),
        (4, "group"),
        (8, "group"),
    ]
    assert not any(name.endswith(".codes") for name in load_file(folder / "model.safetensors"))


# -- what does not fit -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "knobs", "message"),
    [
        ("llama", {"bits": 4, "group": 32}, r"down_proj\.weight \(its last group is ragged: 48 inputs in groups of 32"),
        ("llama", {"weights": MXFP4}, "48 inputs is not in whole groups of 32"),
        ("llama", {"weights": Float(3, 2) @ group(16)}, "e3m2 is no integer format, nor e4m3"),
        ("llama", {"weights": Int(4, zero="float") @ group(16)}, "offset is a float"),
        ("llama", {"weights": Int(4, sym=True, scale="e8m0") @ group(16)}, "scales are e8m0"),
        ("llama", {"weights": Int(4, sym=True) @ tile(4, 4)}, "blocks span rows"),
        ("mixtral", {"bits": 4, "group": 16}, r"experts\.gate_up_proj \(a parameter, not a Linear"),
        ("gpt2", {"bits": 4, "group": 16}, r"c_attn\.weight \(its layer stores the weight transposed"),
    ],
)
def test_refusals_name_the_layers_and_leave_nothing(
    tmp_path: Path, name: str, knobs: dict[str, Any], message: str
) -> None:
    tiny_models.build(name)[0].save_pretrained(tmp_path / "float")
    dither.quantize(tmp_path / "float", dither.recipes.RTN(**knobs), TOKENS, tmp_path / "out")
    with pytest.raises(ExportError, match=message) as error:
        dither.export(tmp_path / "out", tmp_path / "ct")
    assert "\n" not in str(error.value) and not list((tmp_path / "ct").glob("*"))


def test_quantized_embeddings_are_refused_and_heads_exported(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
    ).save_pretrained(tmp_path / "float")
    for what, layer in (("head", "lm_head"), ("embedding", "model.embed_tokens")):
        recipe = dither.recipes.RTN(bits=4, group=16, sym=True, overrides={layer: Int(8, sym=True) @ group(16)})
        dither.quantize(tmp_path / "float", recipe, TOKENS, tmp_path / what)
    dither.export(tmp_path / "head", tmp_path / "ct")
    assert torch.equal(
        alone(tmp_path / "answer", (tmp_path / "ct", "plain"))[0], logits(dither.load(tmp_path / "head")[0])
    )
    with pytest.raises(ExportError, match=r"model\.embed_tokens\.weight \(an embedding"):
        dither.export(tmp_path / "embedding", tmp_path / "ct2")


def test_wrong_calls(exported: dict[str, Any], tmp_path: Path) -> None:
    out, folder, _ = exported["sym4"]
    for source, target, to, message in (
        (out, tmp_path / "x", "zip", "--to zip: is unknown; the formats are compressed-tensors"),
        (exported["root"] / "float", tmp_path / "x", "compressed-tensors", "no finished checkpoint"),
        (tmp_path / "nowhere", tmp_path / "x", "compressed-tensors", "no finished checkpoint"),
        (out, folder, "compressed-tensors", "not an empty folder"),
        (out, folder / "config.json", "compressed-tensors", "not an empty folder"),
    ):
        with pytest.raises(UsageError, match=message):
            dither.export(source, target, to=to)
    with pytest.raises(UsageError, match="in memory"):
        dither.export(
            dither.quantize(tiny_models.build("llama")[0], dither.recipes.RTN(bits=4, group=16)), tmp_path / "x"
        )
    assert not (tmp_path / "x").exists()


def test_damaged_checkpoints_are_not_exported(exported: dict[str, Any], tmp_path: Path) -> None:
    import shutil

    shutil.copytree(exported["sym4"][0], tmp_path / "copy")
    path = tmp_path / "copy" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.scale"][0, 0] = float("nan")
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"up_proj\.scale: holds NaN"):
        dither.export(tmp_path / "copy", tmp_path / "ct")
    assert not (tmp_path / "ct" / "config.json").exists()


def test_the_tokenizer_goes_along(tmp_path: Path) -> None:
    tiny_folder.save(tmp_path / "float")
    dither.quantize(tmp_path / "float", dither.recipes.RTN(bits=4, group=16, sym=True), TOKENS, tmp_path / "out")
    dither.export(tmp_path / "out", tmp_path / "ct")
    assert (tmp_path / "ct" / "tokenizer.json").read_bytes() == (tmp_path / "out" / "tokenizer.json").read_bytes()
    assert not (tmp_path / "ct" / "dither.json").exists()


def test_scheme_survives_a_wide_group() -> None:
    wide: Scheme = Int(4, sym=True) @ group(64)
    assert as_read(wide, 32).blocks == channel() and as_read(wide, 128) == wide
