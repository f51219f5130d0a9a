"""Static inputs: one grid for all that a layer will ever read, fitted on calibration data.

    q = clamp(round(x / s) + z, 0, 2^b - 1),   x_hat = s (q - z)            [lo, hi] from quantiles (`formats.quantiles`) or from min and max

per tensor, asymmetric; the range need not contain 0. Fitted on the float model's activations (`statistics.rows`: at most 2048 tokens), all layers at
once; RepQ's code fits one after the other, each on what the layers before it give once rounded.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from dither.formats import Int, Params, tensor
from dither.formats.format import Format
from dither.formats.quantiles import Make, free_affine, quantile_search
from dither.quant.inputs import InputQuant
from dither.quant.parts import BlockView, Transform
from dither.quant.statistics import ROWS

FEW = 8  # samples below which ranges are little more than noise


@dataclass(frozen=True)
class StaticInputs(Transform):
    """Gives every layer's input a static grid of ``bits`` bits, unless another part gave it one. ``search``: "quantile" or "minmax"."""

    bits: int = 4
    search: str = "quantile"
    needs: ClassVar[frozenset[str]] = frozenset({ROWS})
    uses_sites: ClassVar[bool] = False

    def captures(self, block: BlockView) -> Collection[str]:
        return ()

    def apply(self, block: BlockView) -> None:
        if block.samples < FEW:
            block.notes.append(f"static ranges were calibrated on {block.samples} samples only: give {FEW} or more (32 are usual)")
        fmt = Int(self.bits, scale="float32")
        for name in block.schemes:
            if name in block.inputs:
                continue
            statistics = block.statistics.get(name)
            if statistics is None:
                block.notes.append(f"{block.name}.{name}: its input stays float, since no calibration data reached it as a module")
                continue
            fit = partial(static, statistics.rows, fmt, self.search, free_affine(self.bits))
            block.inputs[name] = statistics.derived(("static input", self.bits, self.search), fit)


def static(x: Tensor, fmt: Format, search: str, make: Make | None = None) -> InputQuant:
    """One grid for all of ``x [R, I]``; ``make``: as for `quantile_search`."""
    if not bool(torch.isfinite(x).all()):
        raise ValueError("the calibration data gives activations that are NaN or inf")
    values = x.reshape(1, 1, -1)  # one block
    if search == "quantile":
        params = quantile_search(values, fmt, make)
    else:
        params = fmt.fit(values) if make is None else make(values.amin(-1), values.amax(-1))
    return InputQuant(fmt @ tensor(), _single(params))


def _single(params: Params) -> Params:
    return {k: v.reshape(1, 1).float() for k, v in params.items()}
