"""AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration.

Lin, Tang, Tang, Yang, et al.; MLSys 2024; arXiv 2306.00978. Scale search (`transforms.scale`), then clipping search (`grids.OutputClip`), then
nearest; everything is judged on the float model's activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from dither.quant.grids import MinMax, OutputClip
from dither.quant.parts import Part
from dither.quant.recipe import Method
from dither.quant.rounding.nearest import Nearest
from dither.quant.transforms.scale import ScaleSearch


@dataclass(frozen=True, kw_only=True)
class AWQ(Method):
    """``round=False`` leaves the rounding to the next method of a chain; where that stores no grid, scales are searched on AWQ's own."""

    name: ClassVar[str] = "awq"
    source: ClassVar[str] = "arXiv 2306.00978"

    grid: int = 20  # section 4.1: exponents tried
    clip: bool = True
    clip_mode: str = "1d"  # both ends of a group's range shrink alike; "absolute": weights are clamped to +-c, the paper's code
    clip_guard: bool = False  # keep a layer's full range where clipping does not help inputs that the search did not see
    gqa: bool = False  # also scale v -> o under grouped-query attention; the paper's code does not
    search_tokens: int = 1024
    round: bool = True

    def stages(self) -> Sequence[Part]:
        parts: list[Part] = [self._search()]
        parts.append(OutputClip(guard=self.clip_guard, mode=self.clip_mode) if self.clip else MinMax())
        return [*parts, Nearest()] if self.round else parts

    def _search(self) -> ScaleSearch:
        own = None if self.round else (self.bits, self.group)
        return ScaleSearch(grid=self.grid, grouped_query=self.gqa, tokens=self.search_tokens, stand_in=own)
