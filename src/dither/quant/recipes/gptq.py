"""GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers.

Frantar, Ashkboos, Hoefler, Alistarh; ICLR 2023; arXiv 2210.17323. The loop is `rounding.columns`; "true sequential" is how the engine
walks (`quant.walker`), so it is always on and costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from dither.quant.grids import MinMax, OutputClip, PowerClip
from dither.quant.parts import Grid, Part
from dither.quant.recipe import Method
from dither.quant.rounding.columns import Columns


@dataclass(frozen=True, kw_only=True)
class GPTQ(Method):
    """``clip``: "none" = min-max grids as in the paper; "power" = the reference code's L_2.4 search (``mse``); "output" = the range
    that costs each group's output least. ``compat``: "reference" fits dynamic groups from the weights that the reference code reads."""

    name: ClassVar[str] = "gptq"
    source: ClassVar[str] = "arXiv 2210.17323"

    act_order: bool = True  # the authors' README recommends it
    static_groups: bool = True
    damp: float = 0.01  # section 3.3, step 2
    block: int = 128  # section 3.3, step 2
    clip: str = "none"
    compat: str = "none"

    def stages(self) -> Sequence[Part]:
        grids: dict[str, Grid] = {"none": MinMax(), "power": PowerClip(), "output": OutputClip(spare_attention=False)}
        if self.clip not in grids:
            raise ValueError(f"clip must be one of {', '.join(grids)}, not {self.clip!r}")
        if not self.static_groups and self.clip == "output":
            raise ValueError("clip: 'output' searches grids before the loop, static_groups=False makes them within it; take 'power' or static groups")
        within = None if self.static_groups or self.clip == "none" else PowerClip().search  # grids made in the loop are searched there
        return [
            grids[self.clip if within is None else "none"],
            Columns(self.act_order, self.static_groups, self.damp, self.block, self.compat, clip=within),
        ]
