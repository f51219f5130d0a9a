"""The function under the transform, as samples are drawn from it: a callable on masks or on rows of bits, or an array of all its values.

Batches are of at most 2^20 masks. What comes back is checked: one finite number for each mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dither.special.spright.gf2 import Masks, Values, units

BATCH = 1 << 20
Function = Callable[[Any], Any]


def to_bits(masks: Masks, n: int) -> np.ndarray:
    """``[Q, n]`` uint8: bit i of each mask in column i."""
    found: np.ndarray = ((masks[:, None] & units(n)[None, :]) != 0).astype(np.uint8)
    return found


class Samples:
    """``f(masks [Q] uint64) -> [Q]`` float64 or complex128, with ``calls`` counting the masks."""

    def __init__(self, f: Function | np.ndarray, n: int, bits: bool) -> None:
        self.f, self.n, self.bits, self.calls = f, n, bits, 0

    def __call__(self, masks: Masks) -> Values:
        self.calls += len(masks)
        if not len(masks):
            return np.zeros(0)
        return np.concatenate([self._batch(masks[i : i + BATCH]) for i in range(0, len(masks), BATCH)])

    def _batch(self, masks: Masks) -> Values:
        if isinstance(self.f, np.ndarray):
            return self._checked(self.f[masks], masks)
        return self._checked(np.asarray(self.f(to_bits(masks, self.n) if self.bits else masks)), masks)

    def _checked(self, values: np.ndarray, masks: Masks) -> Values:
        if values.shape != masks.shape:
            raise ValueError(f"f: returned shape {list(values.shape)} for {len(masks)} masks, must be [{len(masks)}]")
        if values.dtype.kind not in "fciub":
            raise ValueError(f"f: returned dtype {values.dtype}, must be numbers")
        values = values.astype(np.complex128 if values.dtype.kind == "c" else np.float64)
        if not np.isfinite(values).all():
            at = int(np.flatnonzero(~np.isfinite(values))[0])
            raise ValueError(f"f: returned {values[at]} for mask {int(masks[at])}, must be finite")
        return values
