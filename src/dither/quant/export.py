"""Exports a checkpoint to formats that other programs load. See `export`.

compressed-tensors ("pack-quantized", transformers and vLLM): integer codes of 1 to 8 bits, LSB first along the input, int32 words; one scale a
group or row; zero points packed along the output. Our integer grids fit exactly: the weights that the other program decodes are
ours, bit for bit. What does not fit (float formats, float offsets, tiles, stacks of experts, ragged groups) is refused by name.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dither.errors import ExportError, UsageError
from dither.formats import Int, QTensor, Scheme
from dither.quant.checkpoint import is_checkpoint, replaced_of
from dither.quant.outcome import REPORT, Quantized
from dither.quant.store import explained, read_tensors, write_text

WEIGHTS = "model.safetensors"


def export(checkpoint: str | Path | Quantized, out: str | Path, to: str = "compressed-tensors") -> list[str]:
    """Write ``checkpoint`` (a folder that dither made) to folder ``out`` in format ``to``. Returns notes for the user.

    Raises UsageError (unknown format, not our checkpoint, ``out`` in use), ExportError that lists the layers that do not fit.
    """
    if to not in TARGETS:
        raise UsageError(f"--to {to}: is unknown; the formats are {', '.join(TARGETS)}")
    if isinstance(checkpoint, Quantized):
        if checkpoint.out is None:
            raise UsageError("the model was quantized in memory; give quantize(..., out=FOLDER) to export it")
        checkpoint = checkpoint.out
    source, target = Path(checkpoint), Path(out)
    if not is_checkpoint(source) or not (source / "config.json").is_file():
        raise UsageError(f"{source}: is no finished checkpoint of dither; make one with 'dither quantize'")
    if target.exists() and any(target.iterdir()):
        raise UsageError(f"{target}: is not empty; choose another folder")
    config = json.loads((source / "config.json").read_text())
    replaced = replaced_of(config["quantization_config"])
    tensors = read_tensors(source)
    with explained(target):
        target.mkdir(parents=True, exist_ok=True)
        return TARGETS[to](source, target, config, replaced, tensors)


def _compressed_tensors(
    source: Path, out: Path, config: dict[str, Any], replaced: dict[str, dict[str, Any]], tensors: dict[str, Tensor]
) -> list[str]:
    misfits = [f"{name} ({why})" for name, entry in replaced.items() if (why := _misfit(entry))]
    if misfits:
        raise ExportError(
            f"compressed-tensors cannot hold {len(misfits)} of {len(replaced)} weights exactly: {', '.join(misfits[:3])}"
            f"{' ...' if len(misfits) > 3 else ''}; quantize with an integer scheme whose group size divides the inputs"
        )
    stored = dict(tensors)
    schemes: list[Scheme] = []
    members: list[list[str]] = []
    for name, entry in replaced.items():
        scheme = Scheme.from_json(entry["scheme"])
        prefix = entry["prefix"] + "."
        keys = QTensor.empty(scheme, tuple(entry["shape"])).tensors().keys()
        own = {key: stored.pop(prefix + key) for key in keys}
        qtensor = QTensor.from_tensors(own, scheme, tuple(entry["shape"]))
        for key, value in _packed(qtensor, scheme).items():
            stored[prefix + key] = value
        if scheme not in schemes:
            schemes.append(scheme)
            members.append([])
        members[schemes.index(scheme)].append(name.removesuffix(".weight"))
    linear = {n.removesuffix(".weight") for n in replaced}
    floats = sorted(
        {n.removesuffix(".weight") for n, t in stored.items() if n.endswith(".weight") and t.dim() == 2} - linear
    )
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": [*floats, *([] if "lm_head" in linear else ["lm_head"])],
        "config_groups": {
            f"group_{i}": _group(s, ["Linear"] if len(schemes) == 1 else m)
            for i, (s, m) in enumerate(zip(schemes, members, strict=True))
        },
    }
    from safetensors.torch import save_file

    temporary = out / (WEIGHTS + ".tmp")
    save_file({k: v.contiguous() for k, v in stored.items()}, temporary, metadata={"format": "pt"})
    temporary.rename(out / WEIGHTS)
    _sidecars(source, out)
    write_text(out / "config.json", json.dumps(config, indent=2, sort_keys=True))
    notes = []
    if any(not _symmetric(s) for s in schemes):
        notes.append(
            "asymmetric weights: transformers 5.2x with compressed-tensors 0.20 loads them with "
            "from_pretrained(..., quantization_config=CompressedTensorsConfig(dequantize=True)); without it that pair of versions fails"
        )
    return notes


def _symmetric(scheme: Scheme) -> bool:
    return isinstance(scheme.format, Int) and bool(scheme.format.sym)


def _misfit(entry: dict[str, Any]) -> str:
    """Why a weight does not fit "pack-quantized"; empty where it does."""
    scheme = Scheme.from_json(entry["scheme"])
    if entry["kind"] != "linear":
        return f"a {entry['kind']}, not a Linear"
    if not isinstance(scheme.format, Int):
        return f"{scheme.format} is no integer format"
    if scheme.format.zero == "float" and not scheme.format.sym:
        return "its offset is a float"
    if scheme.format.scale not in ("float16", "bfloat16", "float32"):
        return f"its scales are {scheme.format.scale}"
    columns = scheme.blocks.column_groups(entry["shape"][1])
    if scheme.blocks.grid_shape(*entry["shape"])[0] not in (1, entry["shape"][0]):
        return "its blocks span rows"
    if scheme.is_ragged(entry["shape"][1]) and int(columns.max()) > 0:
        return f"its last group is ragged: {entry['shape'][1]} inputs"
    return ""


def _packed(tensor: QTensor, scheme: Scheme) -> dict[str, Tensor]:
    """The stored tensors of one Linear in the "pack-quantized" layout."""
    assert isinstance(scheme.format, Int)
    bits, (rows, columns) = scheme.format.bits, tensor.shape
    grid = (rows, tensor.params["scale"].shape[1])
    packed = {
        "weight_packed": _words(tensor.codes, bits),
        "weight_scale": tensor.tensors()["scale"].expand(grid).contiguous(),
        "weight_shape": torch.tensor([rows, columns], dtype=torch.int64),
    }
    if not scheme.format.sym:
        zero = tensor.params["zero_point"].expand(grid).to(torch.uint8)  # (O, G)
        packed["weight_zero_point"] = _words(
            zero.T.contiguous(), bits
        ).T.contiguous()  # the stream runs along O: (ceil(O b / 32), G)
    return packed


def _words(codes: Tensor, bits: int) -> Tensor:
    """``codes [R, N]`` uint8 -> int32 words ``[R, ceil(N bits / 32)]``, LSB first along N: our own row layout, seen as words."""
    from dither.formats.packing import pack_rows

    return pack_rows(codes, bits).view(torch.int32)


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    assert isinstance(scheme.format, Int)
    size = scheme.blocks.columns(1 << 30)
    whole_row = size >= 1 << 30
    return {
        "targets": targets,
        "input_activations": None,
        "output_activations": None,
        "weights": {
            "num_bits": scheme.format.bits,
            "type": "int",
            "symmetric": bool(scheme.format.sym),
            "dynamic": False,
            "strategy": "channel" if whole_row else "group",
            "group_size": None if whole_row else size,
            "observer": "minmax",
        },
    }


def _sidecars(source: Path, out: Path) -> None:
    """Tokenizer, generation settings: everything small that is not ours."""
    for file in sorted(source.iterdir()):
        if (
            file.is_file()
            and file.suffix in (".json", ".model", ".txt", ".jinja")
            and file.name not in ("config.json", REPORT, "model.safetensors.index.json")
        ):
            shutil.copy2(file, out / file.name)


TARGETS: dict[str, Callable[[Path, Path, dict[str, Any], dict[str, dict[str, Any]], dict[str, Tensor]], list[str]]] = {
    "compressed-tensors": _compressed_tensors,
}
