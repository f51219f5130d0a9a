"""SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models.

Xiao, Lin, Seznec, Wu, Demouth, Han; ICML 2023; arXiv 2211.10438. Outliers of activations move into the weights (`transforms.smooth`), then weights
and inputs are rounded to nearest, or by the next method of a chain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from dither.quant.grids import MinMax
from dither.quant.parts import Part
from dither.quant.recipe import Method
from dither.quant.rounding.nearest import Nearest
from dither.quant.transforms.smooth import Smooth


@dataclass(frozen=True, kw_only=True)
class SmoothQuant(Method):
    """W8A8 as in the paper: one scale a row of weights, one a token of inputs. ``alpha``: how much of the outliers goes to the weights;
    ``everywhere``: also between weights (v -> o, up -> down), not only behind norms; ``gqa``: also v -> o under grouped-query attention.
    ``round=False`` leaves the rounding to the next method of a chain."""

    name: ClassVar[str] = "smoothquant"
    source: ClassVar[str] = "arXiv 2211.10438"

    bits: int = 8
    group: int | None = None
    sym: str | bool = True
    act_bits: int | None = 8
    alpha: float = 0.5  # section 4; 0.75 and more for models with more outliers
    everywhere: bool = False
    gqa: bool = False
    round: bool = True

    @property
    def stores(self) -> bool:
        return self.round

    def stages(self) -> Sequence[Part]:
        smooth = Smooth(alpha=self.alpha, everywhere=self.everywhere, grouped_query=self.gqa)
        return [smooth, MinMax(), Nearest()] if self.round else [smooth]
