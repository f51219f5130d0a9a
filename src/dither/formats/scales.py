"""How a block's scale is stored: float16, bfloat16, float32, e8m0 (a power of two) or e4m3 (8-bit float under a per-tensor float32).

Codes are always computed with the scale *as stored*, so that ``scale * code`` on disk is exactly what was optimised.
"""

from __future__ import annotations

import torch
from torch import Tensor

STORAGE: dict[str, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "e8m0": torch.float8_e8m0fnu,
    "e4m3": torch.float8_e4m3fn,
}
BITS = {"float16": 16, "bfloat16": 16, "float32": 32, "e8m0": 8, "e4m3": 8}
# smallest and largest magnitude that a scale may take: below, the stored value would be 0 and the block NaN
_SMALLEST = {"float16": 2.0**-24, "bfloat16": 2.0**-126, "float32": 2.0**-126, "e8m0": 2.0**-127, "e4m3": 2.0**-9}
_LARGEST = {"float16": 65504.0, "bfloat16": 3.3895313892515355e38, "float32": 3.4028234663852886e38, "e8m0": 2.0**127, "e4m3": 448.0}


def check(name: str) -> None:
    """Raises ValueError for an unknown storage type."""
    if name not in STORAGE:
        raise ValueError(f"scale must be one of {', '.join(STORAGE)}, not {name!r}")


def stored(scale: Tensor, name: str, headroom: float = 1.0) -> Tensor:
    """``scale`` rounded to what storage type ``name`` holds, in ``scale``'s own type; its magnitude is kept off zero and infinity.

    ``headroom``: how far beyond the largest code a value may lie and still round to it, (max + half a step) / max. A power of two is the
    smallest one under which the block's largest value rounds into the code range: for e2m1 that is the threshold 7 / 6 (mantissa
    1.75) of the MX reference quantizers.
    """
    magnitude = scale.abs().clamp(_SMALLEST[name], _LARGEST[name])
    if name == "e8m0":
        exponent = torch.log2(magnitude.double() / headroom).ceil().clamp(-127, 127)
        rounded = torch.exp2(exponent).to(scale.dtype)
    else:
        rounded = magnitude.to(torch.float32).to(STORAGE[name]).to(scale.dtype).clamp(min=_SMALLEST[name])
    return torch.where(scale < 0, -rounded, rounded)
