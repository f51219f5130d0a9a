"""The checkpoint layout of AWQ ("gemm"), which vLLM and others load: 4 bits, zero points, one group size.

    qweight  int32 [I, O / 8]   eight codes a word: nibble k of word j is output 8 j + (0, 2, 4, 6, 1, 3, 5, 7)[k]
    qzeros   int32 [G, O / 8]   zero points in the same order
    scales   float16 [G, O]
    w[o, i] = scales[g, o] (q[i, o] - z[g, o]),  g = i // group_size

Codes of 1 to 3 bits are stored as 4 bits with the values they have.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dither.formats import QTensor, Scheme
from dither.quant.export.gptq_layout import zero_points
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

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output in each nibble of a word, lowest first


def misfits(weights: Sequence[Weight]) -> Misfits:
    alone = {weight.name: why for weight in weights if (why := _misfit(weight))}
    return uncommon([weight for weight in weights if weight.name not in alone], size_or_row) | alone


def _misfit(weight: Weight) -> str:
    """Why a weight by itself does not fit; empty where it does."""
    if why := no_float16_groups(weight):
        return why
    if (bits := integers(weight).bits) > 4:
        return f"it has {bits} bits, not 4"
    return f"{weight.shape[0]} outputs are not whole words of 8" if weight.shape[0] % 8 else ""


def nearest(weights: Sequence[Weight], bits: int) -> dict[str, Scheme]:
    """In 4 bits, whatever ``bits`` says."""
    return one_grid(weights, misfits, 4)


def write(checkpoint: Opened, out: Path) -> list[str]:
    """Memory: all stored tensors, twice."""
    stored, weights = checkpoint.floats(), checkpoint.to_write()
    for weight in weights:
        for key, value in packed(checkpoint.qtensor(weight)).items():
            stored[f"{weight.prefix}.{key}"] = value
    quantization = {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": size_or_row(weights[0]) if weights else -1,
        "zero_point": True,
        "modules_to_not_convert": checkpoint.float_linears(),
    }
    checkpoint.write_folder(out, stored, quantization)
    return []


def packed(tensor: QTensor) -> dict[str, Tensor]:
    """The stored tensors of one Linear."""
    return {
        "qweight": _words(tensor.codes.T),
        "qzeros": _words(zero_points(tensor).T),
        "scales": tensor.stored["scale"].T,
    }


def _words(codes: Tensor) -> Tensor:
    """``[N, O]`` codes below 16 -> int32 ``[N, O / 8]``."""
    nibbles = codes.reshape(codes.shape[0], -1, 8)[..., list(ORDER)]
    return (nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)).contiguous().view(torch.int32)[..., 0]


TARGET = Target(
    name="awq",
    holds="Linear layers on integers of 1 to 4 bits with float16 scales, in groups of one size or rows",
    misfits=misfits,
    nearest=nearest,
    write=write,
)
