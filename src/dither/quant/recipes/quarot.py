"""QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs.

Ashkboos, Mohtashami, Croci, Li, Cameron, Jaggi, Alistarh, Hoefler, Hensman; NeurIPS 2024; arXiv 2404.00456. Random Hadamard matrices are folded
into the weights or applied at run time (`transforms.rotate`), which spreads the outliers of activations; then weights, inputs, keys and values are
rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from dither.quant.grids import MinMax, PowerClip
from dither.quant.parts import Grid, Part
from dither.quant.recipe import Method
from dither.quant.rounding.columns import Columns
from dither.quant.rounding.nearest import Nearest
from dither.quant.transforms.rotate import Rotate


@dataclass(frozen=True, kw_only=True)
class Rotating(Method):
    """What methods that rotate the whole model have in common: symmetric weights, one scale a row; inputs, keys and values in few bits too.

    ``rounding``: "gptq" or "rtn"; ``clip``: search each row's range by squared error, shrinking it to 1 - i/100 for i < 80; ``damp``: of GPTQ;
    ``online``: Hadamard turns of inputs at run time; ``head_groups``: one scale a head for the inputs behind the heads of values. ``round=False``
    leaves the grid and the rounding to the next method of a chain.
    """

    group: int | None = None
    sym: str | bool = True
    act_bits: int | None = 4
    kv_bits: int | None = 4
    rounding: str = "gptq"
    clip: bool = True
    damp: float = 0.01
    online: bool = True
    head_groups: bool = True  # OSTQuant's code: groups of the head's size
    round: bool = True

    @property
    def stores(self) -> bool:
        return self.round

    def weight_stages(self) -> list[Part]:
        """Grid and rounding, if they are its business."""
        if self.rounding not in ("gptq", "rtn"):
            raise ValueError(f"rounding must be 'gptq' or 'rtn', not {self.rounding!r}")
        grid: Grid = PowerClip(p=2.0) if self.clip else MinMax()
        if not self.round:
            return []
        return [grid, Columns(act_order=False, damp=self.damp) if self.rounding == "gptq" else Nearest()]


@dataclass(frozen=True, kw_only=True)
class QuaRot(Rotating):
    """Random rotations, then GPTQ (or nearest). See `Rotating` for the knobs."""

    name: ClassVar[str] = "quarot"
    source: ClassVar[str] = "arXiv 2404.00456"

    def stages(self) -> Sequence[Part]:
        return [Rotate(self.online, self.head_groups), *self.weight_stages()]
