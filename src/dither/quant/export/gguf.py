"""GGUF, which llama.cpp and transformers load: one file ``model.gguf`` with weights, config and tokenizer.

Few-bit weights become ggml's blocks of 32 (`gguf_blocks`: which grids fit exactly, and as what); vectors are float32, other float parameters the
smallest of float16, bfloat16 and float32 that holds their values. k-quants are never written: the scales of their blocks are themselves few-bit,
which ours are not. The file is read again before the export ends: config and every tensor must come back as they went in, to the last bit (norms
that GGUF stores plus one: to float32 rounding).
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dither.errors import ExportError, ModelError
from dither.formats import Int, Scheme
from dither.models.gguf_file import GGUFSource, as_config, read_config
from dither.models.gguf_layout import read_layout
from dither.quant.export import gguf_tokenizer
from dither.quant.export.gguf_blocks import BLOCK, block_type, blocks, of_scheme
from dither.quant.export.gguf_metadata import described, lost
from dither.quant.export.gguf_names import Place, architecture, places
from dither.quant.export.target import Misfits, Opened, Target, Weight, article

FILE = "model.gguf"
QUANTIZATION_VERSION = 2  # of ggml's blocks


def misfits(weights: Sequence[Weight]) -> Misfits:
    return {weight.name: why for weight in weights if (why := _no_matrix(weight) or block_type(weight.scheme, weight.shape[1])[1])}


def _no_matrix(weight: Weight) -> str:
    """Why a weight is no matrix of its own in a GGUF, whatever its scheme."""
    if weight.rounds:
        return "its inputs are rounded at run time"
    if weight.kind == "parameter":
        return f"{article(weight.kind)} that is no matrix of a layer"
    return "its layer has a bias that the float model's has not" if weight.added_bias else ""


def nearest(weights: Sequence[Weight], bits: int) -> dict[str, Scheme]:
    """Q8_0 or Q4_1, for whatever has rows of whole blocks."""
    found = {}
    for weight in weights:
        inputs, scheme = weight.shape[1], weight.scheme
        kind, _ = block_type(scheme, inputs)
        wider = bits == 4 and kind == "Q5_0" and isinstance(scheme.format, Int) and scheme.format.bits == 4  # type: ignore[attr-defined]
        if not _no_matrix(weight) and inputs % BLOCK == 0 and (not kind or wider):
            size = scheme.blocks.columns(inputs) if isinstance(scheme, Scheme) else 1
            found[weight.name] = of_scheme(bits, size % BLOCK == 0 or size >= inputs, scheme)
    return found


def unknown(checkpoint: Opened) -> str:
    try:
        architecture(str(checkpoint.config.get("model_type")))
    except ExportError as error:
        return str(error)
    return ""


def write(checkpoint: Opened, out: Path) -> list[str]:
    """Memory: all stored tensors, and one parameter as the file has it."""
    model = checkpoint.skeleton()
    config: Any = model.config
    arch = architecture(config.model_type)
    spots = places(arch.name, config.to_dict(), model)
    few = {weight.name: weight for weight in checkpoint.to_write()}
    floats = checkpoint.floats()
    for name, spot in spots.items():
        if name not in few and name not in floats:
            raise ExportError(f"gguf: the checkpoint has no {name}")
        if name in few and few[name].swapped != spot.transposed:
            raise ExportError(f"gguf: {name} is stored as [inputs, outputs] on one side only")
    kinds = {name: _kind(few[name] if name in few else floats[name]) for name in spots}
    shapes = {spot.name: few[n].shape if n in few else tuple(spot.values(floats[n]).shape) for n, spot in spots.items()}
    tokenizer = _tokenizer(checkpoint, shapes.get("token_embd.weight", (0,))[0], config)
    about = described(arch, config, shapes.get("blk.0.ffn_up.weight", (None,))[0]) | tokenizer
    path = out / FILE
    temporary = path.with_name(FILE + ".tmp")
    try:
        _write(temporary, arch.name, about, kinds, spots, shapes, checkpoint, few, floats)
        _prove(temporary, config, spots, few, floats, checkpoint)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return _notes(kinds, few, tokenizer)


def _tokenizer(checkpoint: Opened, rows: int, config: Any) -> gguf_tokenizer.Metadata:
    if checkpoint.tokenizer is None:
        return gguf_tokenizer.of_folder(checkpoint.folder, rows, config)
    return gguf_tokenizer.of_file(checkpoint.tokenizer, rows)


def _kind(value: Weight | Tensor) -> str:
    """The ggml type of a parameter."""
    if isinstance(value, Weight):
        return block_type(value.scheme, value.shape[1])[0]
    if value.dim() < 2:
        return "F32"
    exact = value.float()
    for dtype, name in ((torch.float16, "F16"), (torch.bfloat16, "BF16")):
        if torch.equal(value.to(dtype).float(), exact):
            return name
    return "F32"


def _write(
    path: Path,
    arch: str,
    about: Mapping[str, Any],
    kinds: Mapping[str, str],
    spots: Mapping[str, Place],
    shapes: Mapping[str, tuple[int, ...]],
    checkpoint: Opened,
    few: Mapping[str, Weight],
    floats: Mapping[str, Tensor],
) -> None:
    """Metadata and tensors, one tensor at a time."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, LlamaFileType

    writer = GGUFWriter(path, arch)
    common = Counter(kinds[name] for name in few).most_common(1)
    kind = common[0][0] if common else "F32"
    writer.add_name(checkpoint.folder.resolve().name)
    writer.add_file_type(next(t for t in LlamaFileType if t.name in (f"MOSTLY_{kind}", f"MOSTLY_{kind}_MOE", f"ALL_{kind}")))
    writer.add_quantization_version(QUANTIZATION_VERSION)
    for key, value in about.items():
        _add(writer, key, value)
    for name, spot in spots.items():
        block, width = GGML_QUANT_SIZES[GGMLQuantizationType[kinds[name]]]
        size = math.prod(shapes[spot.name]) // block * width
        writer.add_tensor_info(spot.name, shapes[spot.name], np.dtype(np.float32), size, raw_dtype=GGMLQuantizationType[kinds[name]])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, spot in spots.items():
        if name in few:
            writer.write_tensor_data(blocks(spot.few_bit(checkpoint.qtensor(few[name])))[1])
        else:
            writer.write_tensor_data(_floats(spot.values(floats[name]), kinds[name]))
    writer.close()


def _add(writer: Any, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, list(value))


def _floats(value: Tensor, kind: str) -> Any:
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}[kind]
    held = value.to(dtype).contiguous()
    return (held.view(torch.uint16) if dtype == torch.bfloat16 else held).numpy()


def _prove(
    path: Path, config: Any, spots: Mapping[str, Place], few: Mapping[str, Weight], floats: Mapping[str, Tensor], checkpoint: Opened
) -> None:
    """Read the file as transformers does, and compare. Raises ExportError where it says something else."""
    try:
        differs = lost(config, as_config(path, read_config(read_layout(path))[0]))
        if differs:
            raise ExportError(f"gguf: transformers would read another model from the file ({'; '.join(differs[:3])})")
        source = GGUFSource(path.name, path)
        for name, spot in spots.items():
            if name in few:
                matrix = checkpoint.qtensor(few[name]).dequantize()
                expected = matrix.T if few[name].swapped else matrix
            else:
                expected = floats[name].float()
            read = source.tensor(name, torch.float32)
            slack = 2.0**-23 * (expected.abs() + abs(spot.less)) if spot.less else torch.zeros(())
            if read.shape != expected.shape or not bool(((read - expected).abs() <= slack).all()):
                raise ExportError(f"gguf: transformers would read other values of {name} from the file")
    except ModelError as error:
        raise ExportError(f"gguf: transformers would not read the file ({error})") from None


def _notes(kinds: Mapping[str, str], few: Mapping[str, Weight], tokenizer: gguf_tokenizer.Metadata) -> list[str]:
    counts = Counter(kinds[name] for name in few)
    notes = ["weights as " + ", ".join(f"{kind} ({count})" for kind, count in counts.most_common())]
    wide = [w for w in few.values() if kinds[w.name] == "Q5_0" and w.scheme.format.bits == 4]  # type: ignore[attr-defined]
    if wide:
        notes.append(
            f"{len(wide)} weights of 4 bits with zero points are Q5_0 (5.5 bits a weight), which holds them exactly; --nearest --bits 4 writes Q4_1 "
            "(5 bits), offsets rounded to float16"
        )
    if tokenizer["tokenizer.ggml.model"] == "none":
        notes.append("the checkpoint has no tokenizer, so the file has none: it takes tokens, not text")
    return notes


TARGET = Target(
    name="gguf",
    holds="matrices with rows of whole blocks of 32, on integers with float16 scales in groups of 32 or multiples, or mxfp4",
    misfits=misfits,
    nearest=nearest,
    write=write,
    unknown=unknown,
)
