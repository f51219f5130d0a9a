"""The checkpoint layout of GPTQ's first implementations, which GPTQModel, vLLM, ExLlama and others load.

    qweight  int32 [I b / 32, O]   codes of b bits (2, 3, 4 or 8), LSB first along the inputs of each output
    qzeros   int32 [G, O b / 32]   zero points, LSB first along the outputs; one less than they are in checkpoint_format "gptq"
    scales   float16 [G, O]
    g_idx    int32 [I]             the group of each input
    w[o, i] = scales[g, o] (q[i, o] - z[g, o]),  g = g_idx[i]

A zero point of 0 has no "one less", and loaders do not agree about what 0 - 1 is: where one occurs, the folder is of checkpoint_format "gptq_v2",
which stores zero points as they are. Codes of 1, 5, 6 and 7 bits are stored in the next wider number of bits, with the values they have.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dither.formats import Int, QTensor, Scheme
from dither.formats.packing import pack_rows
from dither.quant.export.target import (
    Misfits,
    Opened,
    Target,
    Weight,
    integers,
    no_float16_groups,
    one_grid,
    size_or_row,
    uncommon,
)

WIDTHS = (2, 3, 4, 8)


def width(bits: int) -> int:
    """Bits that codes of ``bits`` bits are stored in."""
    return next(w for w in WIDTHS if w >= bits)


def misfits(weights: Sequence[Weight]) -> Misfits:
    alone = {weight.name: why for weight in weights if (why := _misfit(weight))}
    return uncommon([weight for weight in weights if weight.name not in alone], _alike) | alone


def _alike(weight: Weight) -> tuple[int, int, bool]:
    """What the layout has one of for all layers: bits, group size (-1: a row), whether zero points are all in the middle."""
    fmt, bits = integers(weight), width(integers(weight).bits)
    return bits, size_or_row(weight), bool(fmt.sym) and fmt.bits == bits


def _misfit(weight: Weight) -> str:
    """Why a weight by itself does not fit; empty where it does."""
    if why := no_float16_groups(weight):
        return why
    bits = width(integers(weight).bits)
    odd = next((n for n in weight.shape if n * bits % 32), None)
    return "" if odd is None else f"{odd} codes of {bits} bits are not whole words of 32"


def nearest(weights: Sequence[Weight], bits: int) -> dict[str, Scheme]:
    return one_grid(weights, misfits, bits)


def write(checkpoint: Opened, out: Path) -> list[str]:
    """Memory: all stored tensors, twice."""
    stored, weights = checkpoint.floats(), checkpoint.to_write()
    as_is = any(bool((zero_points(checkpoint.qtensor(w)) == 0).any()) for w in weights)
    for weight in weights:
        for key, value in packed(checkpoint.qtensor(weight), as_is).items():
            stored[f"{weight.prefix}.{key}"] = value
    bits, size, sym = _alike(weights[0]) if weights else (4, -1, True)
    left = [name for name in checkpoint.float_linears() if name != "lm_head"]
    quantization: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": size,
        "sym": sym,
        "desc_act": False,
        "lm_head": any(weight.layer == "lm_head" for weight in weights),
        "checkpoint_format": "gptq_v2" if as_is else "gptq",
        "pack_dtype": "int32",
    }
    if left:
        quantization["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in left}
    checkpoint.write_folder(out, stored, quantization)
    notes = []
    if as_is:
        notes.append('some zero points are 0, so the folder is of checkpoint_format "gptq_v2": older loaders than GPTQModel and vLLM do not know it')
    if left:
        notes.append(
            f'{len(left)} Linear layers are float, which the folder says under "dynamic": older loaders than GPTQModel and vLLM do not know it'
        )
    return notes


def zero_points(tensor: QTensor) -> Tensor:
    """uint8 ``[O, G]``: of symmetric formats, the code of 0."""
    fmt = tensor.grid.format
    assert isinstance(fmt, Int)
    return torch.full_like(tensor.params["scale"], fmt.middle).to(torch.uint8) if fmt.sym else tensor.params["zero_point"].to(torch.uint8)


def packed(tensor: QTensor, as_is: bool) -> dict[str, Tensor]:
    """The stored tensors of one Linear. ``as_is``: zero points as they are, rather than one less."""
    scheme, bits = tensor.grid, width(tensor.grid.format.bits)
    zero = zero_points(tensor).T.contiguous()  # [G, O]
    return {
        "qweight": pack_rows(tensor.codes, bits).view(torch.int32).T,  # [O, I b / 32] -> [I b / 32, O]
        "qzeros": pack_rows(zero if as_is else zero - 1, bits).view(torch.int32),
        "scales": tensor.stored["scale"].T,
        "g_idx": scheme.column_groups(tensor.shape[1]).to(torch.int32),
    }


TARGET = Target(
    name="gptq",
    holds="Linear layers on integers of 1 to 8 bits with float16 scales, one scheme for all, in equal groups or rows",
    misfits=misfits,
    nearest=nearest,
    write=write,
)
