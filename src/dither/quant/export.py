"""Exports a checkpoint to formats that other programs load. See `export`.

compressed-tensors ("pack-quantized", transformers and vLLM): integer codes of 1 to 8 bits, LSB first along the input, int32 words; one scale a
group or row; zero points packed along the output. Our integer grids fit exactly. What does not fit (float formats, float offsets, tiles,
stacks of experts, embeddings, ragged groups) is refused by name.

What transformers 5.23 with compressed-tensors 0.20 makes of it (checked by the tests; vLLM needs a GPU and was never run):

    symmetric                   the same logits as ours, to the last bit, in float32
    asymmetric                  that version cannot run them packed, so the folder asks its loader to decode them (``"dequantize": true``): each
                                decoded weight is rounded once to the type of the scales (float16: 2^-11 of the weight)
    any, in bfloat16            the loader rounds the scales to bfloat16 (2^-9); quantize with ``scale="bfloat16"`` where that matters
    several schemes             right as it is; with ``dequantize=True`` that version takes the first scheme for all layers
    lm_head by an override      exported as any other layer
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dither.errors import CheckpointError, ExportError, UsageError
from dither.formats import Int, QTensor, Scheme, channel, scheme_from_json
from dither.formats.packing import pack_rows
from dither.models import skeleton
from dither.quant.checkpoint import is_checkpoint, read_config, replaced_of
from dither.quant.outcome import REPORT, Quantized
from dither.quant.store import INDEX, PARTIAL, explained, read_tensors, write_text
from dither.quant.surroundings import Surroundings


def export(checkpoint: str | Path | Quantized, out: str | Path, to: str = "compressed-tensors") -> list[str]:
    """Write ``checkpoint`` (a folder that dither made) to folder ``out`` in format ``to``. Returns notes for the user.

    Raises UsageError (unknown format, not our checkpoint, ``out`` in use), ExportError that lists the layers that do not fit,
    CheckpointError (damaged files).
    """
    if to not in TARGETS:
        raise UsageError(f"--to {to}: is unknown; the formats are {', '.join(TARGETS)}")
    if isinstance(checkpoint, Quantized):
        if checkpoint.out is None:
            raise UsageError("the model was quantized in memory; give quantize(..., out=FOLDER) to export it")
        checkpoint = checkpoint.out
    source, target = Path(checkpoint), Path(out)
    if not is_checkpoint(source) or not (source / "config.json").is_file() or (source / PARTIAL).exists():
        raise UsageError(f"{source}: is no finished checkpoint of dither; make one with 'dither quantize'")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{target}: is not an empty folder; choose another")
    config = read_config(source)
    replaced = replaced_of(config["quantization_config"])
    tensors = read_tensors(source)
    with explained(target):
        target.mkdir(parents=True, exist_ok=True)
        return TARGETS[to](source, target, config, replaced, tensors)


def _compressed_tensors(
    source: Path, out: Path, config: dict[str, Any], replaced: dict[str, dict[str, Any]], tensors: dict[str, Tensor]
) -> list[str]:
    """Memory: all stored tensors at once."""
    if around := Surroundings.from_json(config["quantization_config"]).does():
        raise ExportError(f"compressed-tensors cannot hold what this model does at run time: {', '.join(around)}")
    misfits = [f"{name} ({why})" for name, entry in replaced.items() if (why := _misfit(entry))]
    if misfits:
        raise ExportError(
            f"compressed-tensors cannot hold {len(misfits)} of {len(replaced)} weights exactly: {', '.join(misfits[:3])}"
            f"{' ...' if len(misfits) > 3 else ''}; quantize with an integer scheme whose group size divides the inputs"
        )
    stored = dict(tensors)
    members: dict[Scheme, list[str]] = {}
    for name, entry in replaced.items():
        scheme, prefix = Scheme.from_json(entry["scheme"]), entry["prefix"] + "."
        keys = QTensor.empty(scheme, tuple(entry["shape"])).tensors().keys()
        own = {key: stored.pop(prefix + key) for key in keys if prefix + key in stored}
        try:
            qtensor = QTensor.from_tensors(own, scheme, tuple(entry["shape"]))
        except CheckpointError as error:
            raise CheckpointError(f"{source}: {prefix}{error}; quantize again") from None
        for key, value in _packed(qtensor, scheme).items():
            stored[prefix + key] = value
        members.setdefault(_as_read(scheme, entry["shape"][1]), []).append(name.removesuffix(".weight"))
    plain = all(_symmetric(s) for s in members)
    config["quantization_config"] = {
        **({} if plain or len(members) > 1 else {"dequantize": True}),
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": _float_linears(source, replaced),
        "config_groups": {
            f"group_{i}": _group(scheme, ["Linear"] if len(members) == 1 else names)
            for i, (scheme, names) in enumerate(members.items())
        },
    }
    from huggingface_hub import save_torch_state_dict

    save_torch_state_dict({k: v.contiguous() for k, v in stored.items()}, out, metadata={"format": "pt"})
    _sidecars(source, out)
    write_text(out / "config.json", json.dumps(config, indent=2, sort_keys=True))
    return _notes(list(members))


def _notes(schemes: list[Scheme]) -> list[str]:
    """What the user must know to load the folder."""
    notes = []
    if not all(_symmetric(s) for s in schemes):
        if len(schemes) > 1:
            notes.append(
                f"{len(schemes)} schemes, of which some are asymmetric: transformers 5.23 with compressed-tensors 0.20 cannot load them, because it "
                "has to decode asymmetric weights at load and takes the first scheme for all layers then"
            )
        else:
            notes.append(
                "asymmetric weights: transformers 5.23 with compressed-tensors 0.20 decodes them as it loads the folder, and runs them in float"
            )
    elif len(schemes) > 1:
        notes.append(
            f"{len(schemes)} schemes: do not load with dequantize=True, which in transformers 5.23 takes the first for all layers"
        )
    return notes


def _float_linears(source: Path, replaced: Mapping[str, Any]) -> list[str]:
    """The Linear layers of the model that stay float, which the format wants to be told of."""
    config = skeleton.read_config(source)
    config.quantization_config = None
    model = skeleton.build(config, skeleton.auto_class(config), "sdpa", torch.float32, where=source)
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and f"{name}.weight" not in replaced]


def _as_read(scheme: Scheme, inputs: int) -> Scheme:
    """The scheme as a layer of ``inputs`` needs it told: a group that holds the whole row is a row, and how clipping was searched
    is nothing to a reader."""
    blocks = channel() if scheme.blocks.columns(inputs) >= inputs else scheme.blocks
    return replace(scheme, blocks=blocks, clip=None)


def _symmetric(scheme: Scheme) -> bool:
    return isinstance(scheme.format, Int) and bool(scheme.format.sym)


def _misfit(entry: dict[str, Any]) -> str:
    """Why a weight does not fit "pack-quantized"; empty where it does."""
    scheme = scheme_from_json(entry["scheme"])
    if not isinstance(scheme, Scheme):
        return f"{scheme} is no grid of numbers"
    if entry.get("inputs") is not None:
        return "its inputs are rounded at run time"
    if entry["kind"] != "linear":
        return f"{'an' if entry['kind'] == 'embedding' else 'a'} {entry['kind']}, not a Linear"
    if entry["swapped"]:
        return "its layer stores the weight transposed, so it is no Linear"
    if not isinstance(scheme.format, Int):
        return f"{scheme.format} is no integer format"
    if scheme.format.zero == "float" and not scheme.format.sym:
        return "its offset is a float"
    if scheme.format.scale not in ("float16", "bfloat16", "float32"):
        return f"its scales are {scheme.format.scale}"
    if scheme.blocks.height != 1:
        return "its blocks span rows"
    inputs, size = entry["shape"][1], scheme.blocks.columns(entry["shape"][1])
    if size < inputs and inputs % size:
        return f"its last group is ragged: {inputs} inputs in groups of {size}"
    return ""


def _packed(tensor: QTensor, scheme: Scheme) -> dict[str, Tensor]:
    """The stored tensors of one Linear in the "pack-quantized" layout."""
    assert isinstance(scheme.format, Int)
    bits, (rows, columns) = scheme.format.bits, tensor.shape
    packed = {
        "weight_packed": _words(tensor.codes, bits),
        "weight_scale": tensor.tensors()["scale"],  # (O, G)
        "weight_shape": torch.tensor([rows, columns], dtype=torch.int64),
    }
    if not scheme.format.sym:
        zero = tensor.params["zero_point"].to(torch.uint8)  # (O, G)
        packed["weight_zero_point"] = _words(
            zero.T.contiguous(), bits
        ).T  # the stream runs along O: (ceil(O b / 32), G)
    return packed


def _words(codes: Tensor, bits: int) -> Tensor:
    """``codes [R, N]`` uint8 -> int32 words ``[R, ceil(N bits / 32)]``, LSB first along N: our own row layout, seen as words."""
    return pack_rows(codes, bits).view(torch.int32)


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    assert isinstance(scheme.format, Int)
    whole_row = scheme.blocks == channel()
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
            "group_size": None if whole_row else scheme.blocks.width,
            "observer": "minmax",
        },
    }


def _sidecars(source: Path, out: Path) -> None:
    """Tokenizer, generation settings: everything small that is not ours."""
    for file in sorted(source.iterdir()):
        if (
            file.is_file()
            and file.suffix in (".json", ".model", ".txt", ".jinja")
            and file.name not in ("config.json", REPORT, INDEX)
        ):
            shutil.copy2(file, out / file.name)


TARGETS: dict[str, Callable[[Path, Path, dict[str, Any], dict[str, dict[str, Any]], dict[str, Tensor]], list[str]]] = {
    "compressed-tensors": _compressed_tensors,
}
