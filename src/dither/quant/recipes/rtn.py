"""RTN: round every weight to the nearest point of its grid. The baseline that all others are measured against; needs no data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from dither.quant.grids import MinMax, PowerClip
from dither.quant.parts import Part
from dither.quant.recipe import Method
from dither.quant.rounding.nearest import Nearest


@dataclass(frozen=True, kw_only=True)
class RTN(Method):
    """Round to nearest. ``clip``: shrink each block's range to the least L_2.4 weight error first. Off by default: on language models
    the few large weights matter more than the many small ones, and clipping them often costs more than it saves."""

    name: ClassVar[str] = "rtn"
    source: ClassVar[str] = "baseline; conventions of GPTQ's quantizer (arXiv 2210.17323)"

    clip: bool = False

    def stages(self) -> Sequence[Part]:
        return [PowerClip() if self.clip else MinMax(), Nearest()]
