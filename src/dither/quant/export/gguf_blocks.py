"""Our grids as ggml's blocks of 32 weights along a row (the layouts of llama.cpp's `ggml-common.h`), without decoding and rounding again.

    Q4_0   w = d (q - 8)      f16 d, 16 bytes                  4.5 bits a weight
    Q4_1   w = d q + m        f16 d, f16 m, 16 bytes           5
    Q5_0   w = d (q - 16)     f16 d, 32 high bits, 16 bytes    5.5
    Q5_1   w = d q + m        f16 d, f16 m, 32 high bits, ...  6
    Q8_0   w = d q            f16 d, 32 signed bytes           8.5
    MXFP4  w = 2^(e - 127) v  e8m0 e, 16 bytes of e2m1 codes   4.25

Byte j of the 16 holds weight j of a block in its low half, weight j + 16 in its high half; high bits count from the least significant one.

A group of ours is cut into blocks that repeat its scale, so groups must be whole blocks (multiples of 32, or rows of whole blocks; a shorter last
group is none the worse). With an integer zero point z, w = s (q - z): q - z is a signed whole number, so it fits the symmetric types wherever its
range does, exactly: 1 to 3 bits Q4_0, 4 bits Q5_0, up to 7 bits Q8_0. Q4_1 would need m = -s z rounded to float16.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dither.formats import MXFP4, Int, QTensor, Scheme, WeightScheme, group
from dither.quant.export.target import no_grid

BLOCK = 32
Bytes = npt.NDArray[np.uint8]
SIGNED = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 128}  # half of a type's codes: it holds -n .. n - 1


def block_type(scheme: WeightScheme, inputs: int) -> tuple[str, str]:
    """``(type, "")`` of the smallest type that holds ``scheme`` on rows of ``inputs`` exactly, or ``("", why there is none)``."""
    if why := no_grid(scheme):
        return "", why
    assert isinstance(scheme, Scheme)
    if inputs % BLOCK:
        return "", f"its rows of {inputs} are not whole blocks of {BLOCK}"
    size = scheme.blocks.columns(inputs)
    if size % BLOCK and size < inputs:
        return "", f"its groups of {size} are not whole blocks of {BLOCK}"
    fmt = scheme.format
    if fmt == MXFP4.format:
        return "MXFP4", ""
    if not isinstance(fmt, Int):
        return "", f"{fmt} is neither integers nor mxfp4"
    if fmt.scale != "float16":
        return "", f"its scales are {fmt.scale}, not float16"
    if fmt.zero == "float" and not fmt.sym:
        found = "Q4_1" if fmt.bits <= 4 else "Q5_1" if fmt.bits == 5 else ""
        return found, "" if found else f"float offsets come with 4 or 5 bits, not {fmt.bits}"
    lowest, highest = (-fmt.middle, fmt.middle - 1) if fmt.sym else (-fmt.code_max, fmt.code_max)
    for name, half in SIGNED.items():
        if -half <= lowest and highest < half:
            return name, ""
    return "", f"codes minus zero points of {fmt.bits} bits do not fit 8 bits"


def blocks(tensor: QTensor) -> tuple[str, Bytes]:
    """The name of the type and the bytes ``[O, I / 32 x bytes a block]`` of a tensor that `block_type` has a type for."""
    scheme, (rows, inputs) = tensor.grid, tensor.shape
    name, why = block_type(scheme, inputs)
    assert name, why
    at = scheme.column_groups(inputs)[::BLOCK]  # [I / 32]: the group of each block
    if name == "MXFP4":
        scale = tensor.stored["scale"].view(torch.uint8)[:, at, None]
        return name, _joined(rows, scale, _halves(_cut(tensor.codes)))
    fmt = scheme.format
    assert isinstance(fmt, Int)
    d = _halfs(tensor.stored["scale"][:, at])
    if name in ("Q4_1", "Q5_1"):
        codes, head = _cut(tensor.codes), [d, _halfs(tensor.stored["offset"][:, at])]
    else:
        signed = tensor.codes.short() - (fmt.middle if fmt.sym else tensor.params["zero_point"].short()[:, scheme.column_groups(inputs)])
        codes, head = _cut(signed + (0 if name == "Q8_0" else SIGNED[name])), [d]
    if name == "Q8_0":
        return name, _joined(rows, *head, codes.to(torch.int8).view(torch.uint8))
    codes = codes.to(torch.uint8)
    if name in ("Q5_0", "Q5_1"):
        head.append(_bits(codes >> 4))
    return name, _joined(rows, *head, _halves(codes & 15))


def of_scheme(bits: int, whole: bool, scheme: WeightScheme) -> Scheme:
    """The grid, exact in a type of ``bits`` bits (4 or 8), that a weight on ``scheme`` is re-encoded on; ``whole``: its groups are whole blocks."""
    if bits == 4 and whole and isinstance(scheme, Scheme) and isinstance(scheme.format, Int) and not scheme.format.sym and scheme.format.bits == 4:
        return replace(scheme, format=Int(4, zero="float", scale=scheme.format.scale), clip=None)  # its codes stay
    return (Int(4, zero="float") if bits == 4 else Int(8, sym=True)) @ group(BLOCK)


def _cut(codes: Tensor) -> Tensor:
    """``[O, I]`` -> ``[O, I / 32, 32]``."""
    return codes.reshape(codes.shape[0], -1, BLOCK)


def _halves(codes: Tensor) -> Tensor:
    """``[..., 32]`` codes below 16 -> ``[..., 16]`` bytes."""
    return codes[..., :16] | (codes[..., 16:] << 4)


def _bits(codes: Tensor) -> Tensor:
    """``[..., 32]`` zeros and ones -> ``[..., 4]`` bytes, least significant first."""
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
    return (codes.reshape(*codes.shape[:-1], 4, 8) * weights).sum(-1, dtype=torch.uint8)


def _halfs(values: Tensor) -> Tensor:
    """float16 ``[O, B]`` -> its bytes ``[O, B, 2]``."""
    return values.contiguous().view(torch.uint8).reshape(*values.shape, 2)


def _joined(rows: int, *parts: Tensor) -> Bytes:
    found: Bytes = torch.cat(parts, dim=-1).reshape(rows, -1).numpy()
    return found
