"""compressed-tensors, which transformers and vLLM load.

    pack-quantized         integer codes of 1 to 8 bits, LSB first along the input, int32 words; one scale a group or row; zero points packed
                           along the output
    float-quantized        e4m3 bytes; one scale a tensor, a row or a group
    nvfp4-pack-quantized   two e2m1 codes a byte, the first in the low half; an e4m3 scale for 16, divided by one float32 number a tensor
    mxfp4-pack-quantized   the same codes; the exponent of a power of two for 32

Our grids fit exactly. What does not fit (other float formats, float offsets, tiles, stacks of experts, embeddings, ragged groups) is refused by name.

What transformers 5.23 with compressed-tensors 0.20 makes of it (checked by the tests; vLLM needs a GPU and was never run):

    symmetric integers      the same logits as ours, to the last bit, in float32
    asymmetric integers     that version cannot run them packed, so the folder asks its loader to decode them (``"dequantize": true``): each
                            decoded weight is rounded once to the type of the scales (float16: 2^-11 of the weight)
    e4m3                    the same logits as ours, to the last bit, in float32
    mxfp4, nvfp4            unpacked to bfloat16, which that version multiplies with nothing but bfloat16, so this folder too asks to be decoded:
                            mxfp4 then gives our logits to the last bit, nvfp4 weights rounded to bfloat16 (2^-9)
    any, in bfloat16        the loader rounds the scales to bfloat16 (2^-9); quantize with ``scale="bfloat16"`` where that matters
    several schemes         right as it is; with ``dequantize=True`` that version takes the first scheme for all layers
    lm_head by an override  exported as any other layer
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dither.formats import MXFP4, NVFP4, Float, Int, QTensor, Scheme, channel, group
from dither.formats.packing import pack_rows
from dither.quant.export.target import PLAIN, Misfits, Opened, Target, Weight, divisor, no_integers, no_linear, ragged

E4M3 = Float(4, 3)


def write(checkpoint: Opened, out: Path) -> list[str]:
    """Memory: all stored tensors, twice."""
    stored, members = checkpoint.floats(), dict[Scheme, list[str]]()
    for weight in checkpoint.to_write():
        assert isinstance(weight.scheme, Scheme)
        for key, value in packed(checkpoint.qtensor(weight)).items():
            stored[f"{weight.prefix}.{key}"] = value
        members.setdefault(as_read(weight.scheme, weight.shape[1]), []).append(weight.layer)
    layouts = {scheme: layout(scheme) for scheme in members}
    decoded = any(_decoded_at_load(s) for s in members)
    quantization = {
        **({"dequantize": True} if decoded and len(members) == 1 else {}),
        "quant_method": "compressed-tensors",
        "format": next(iter(layouts.values())) if len(set(layouts.values())) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "ignore": checkpoint.float_linears(),
        "config_groups": {
            f"group_{i}": group_of(scheme, ["Linear"] if len(members) == 1 else names)
            for i, (scheme, names) in enumerate(members.items())
        },
    }
    checkpoint.write_folder(out, stored, quantization)
    return _notes(list(members))


def layout(scheme: Scheme) -> str:
    """The name of the layout that holds ``scheme``."""
    if isinstance(scheme.format, Int):
        return "pack-quantized"
    if scheme.format == NVFP4.format:
        return "nvfp4-pack-quantized"
    return "mxfp4-pack-quantized" if scheme.format == MXFP4.format else "float-quantized"


def _notes(schemes: list[Scheme]) -> list[str]:
    """What the user must know to load the folder."""
    notes = []
    kinds = sorted({kind for scheme in schemes if (kind := _decoded_at_load(scheme))})
    if kinds:
        if len(schemes) > 1:
            notes.append(
                f"{len(schemes)} schemes, of which some are {' and '.join(kinds)}: transformers 5.23 with compressed-tensors 0.20 cannot run them, "
                "because it has to decode such weights at load and takes the first scheme for all layers then"
            )
        else:
            notes.append(
                f"{kinds[0]} weights: transformers 5.23 with compressed-tensors 0.20 decodes them as it loads the folder, and runs them in float"
            )
    elif len(schemes) > 1:
        notes.append(
            f"{len(schemes)} schemes: do not load with dequantize=True, which in transformers 5.23 takes the first for all layers"
        )
    return notes


def as_read(scheme: Scheme, inputs: int) -> Scheme:
    """The scheme as a layer of ``inputs`` needs it told: a group that holds the whole row is a row (but for formats that come in groups of one
    size), and how clipping was searched is nothing to a reader."""
    whole = scheme.blocks.kind != "tensor" and scheme.blocks.columns(inputs) >= inputs and scheme.format not in (NVFP4.format, MXFP4.format)
    return replace(scheme, blocks=channel() if whole else scheme.blocks, clip=None)


def _decoded_at_load(scheme: Scheme) -> str:
    """The kind of weights, where the loader has to decode them; empty where it runs them as they are."""
    if isinstance(scheme.format, Int):
        return "" if scheme.format.sym else "asymmetric"
    return {NVFP4.format: "nvfp4", MXFP4.format: "mxfp4"}.get(scheme.format, "")


def misfits(weights: Sequence[Weight]) -> Misfits:
    return {weight.name: why for weight in weights if (why := _misfit(weight))}


def _misfit(weight: Weight) -> str:
    """Why a weight fits none of the layouts; empty where it does."""
    scheme = weight.scheme
    if isinstance(scheme, Scheme) and isinstance(scheme.format, Float):
        return _float_misfit(scheme, weight) or no_linear(weight)
    why = no_integers(scheme) if not isinstance(scheme, Scheme) else ""
    return why or no_linear(weight) or no_integers(scheme) or ragged(weight)


def _float_misfit(scheme: Scheme, weight: Weight) -> str:
    fmt, inputs = scheme.format, weight.shape[1]
    if scheme.format in (NVFP4.format, MXFP4.format):
        size = 16 if scheme.format == NVFP4.format else 32
        same = scheme.blocks == group(size) and inputs % size == 0
        return "" if same else f"{scheme} on {inputs} inputs is not in whole groups of {size}"
    if not isinstance(fmt, Float) or replace(fmt, scale="float16") != E4M3 or fmt.scale not in PLAIN:
        return f"{fmt} is no integer format, nor e4m3, mxfp4 or nvfp4"
    if scheme.blocks.kind == "tensor":
        return ""
    return "its blocks span rows" if scheme.blocks.height != 1 else ragged(weight)


def nearest(weights: Sequence[Weight], bits: int) -> dict[str, Scheme]:
    """Symmetric integers in groups of 128 to 16, or rows."""
    found = {}
    for weight in weights:
        if _misfit(weight) and not no_linear(weight):
            size = divisor(weight.shape[1], (128, 64, 32, 16))
            found[weight.name] = Int(bits, sym=True) @ (channel() if size is None else group(size))
    return found


def packed(tensor: QTensor) -> dict[str, Tensor]:
    """The stored tensors of one Linear in the layout of its scheme, without the name of the layer."""
    scheme, (rows, columns) = tensor.grid, tensor.shape
    match layout(scheme):
        case "float-quantized":
            scale = tensor.stored["scale"]
            return {"weight": tensor.codes.view(torch.float8_e4m3fn), "weight_scale": scale.view(1) if scheme.blocks.kind == "tensor" else scale}
        case "nvfp4-pack-quantized":
            return {
                "weight_packed": pack_rows(tensor.codes, 4),  # [O, I / 2]: rows of whole groups need no padding
                "weight_scale": tensor.stored["scale"],
                "weight_global_scale": tensor.stored["global_scale"].reciprocal().reshape(1),
            }
        case "mxfp4-pack-quantized":
            return {"weight_packed": pack_rows(tensor.codes, 4), "weight_scale": tensor.stored["scale"].view(torch.uint8)}
    assert isinstance(scheme.format, Int)
    bits = scheme.format.bits
    found = {
        "weight_packed": _words(tensor.codes, bits),
        "weight_scale": tensor.stored["scale"],  # (O, G)
        "weight_shape": torch.tensor([rows, columns], dtype=torch.int64),
    }
    if not scheme.format.sym:
        zero = tensor.params["zero_point"].to(torch.uint8)  # (O, G)
        found["weight_zero_point"] = _words(zero.T.contiguous(), bits).T  # the stream runs along O: (ceil(O b / 32), G)
    return found


def _words(codes: Tensor, bits: int) -> Tensor:
    """``codes [R, N]`` uint8 -> int32 words ``[R, ceil(N bits / 32)]``, LSB first along N: our own row layout, seen as words."""
    return pack_rows(codes, bits).view(torch.int32)


def group_of(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    """The record of the layers ``targets``."""
    fmt, blocks = scheme.format, scheme.blocks
    whole_row = blocks == channel()
    strategy = "channel" if whole_row else "tensor" if blocks.kind == "tensor" else "group"
    return {
        "targets": targets,
        "input_activations": None,
        "output_activations": None,
        "format": layout(scheme),
        "weights": {
            "num_bits": fmt.bits,
            "type": "int" if isinstance(fmt, Int) else "float",
            "symmetric": not isinstance(fmt, Int) or bool(fmt.sym),
            "dynamic": False,
            "strategy": "tensor_group" if fmt == NVFP4.format else strategy,
            "group_size": blocks.width if strategy == "group" else None,
            "observer": "minmax",
        },
    }


TARGET = Target(
    name="compressed-tensors",
    holds="Linear layers on integers of 1 to 8 bits, e4m3, mxfp4 or nvfp4, in equal groups or rows",
    misfits=misfits,
    nearest=nearest,
    write=write,
)
