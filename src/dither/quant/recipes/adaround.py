"""AdaRound: Up or Down? Adaptive Rounding for Post-Training Quantization; over blocks, BRECQ.

Nagel, Amjad, van Baalen, Louizos, Blankevoort; ICML 2020; arXiv 2004.10568. Li et al.: BRECQ; ICLR 2021; arXiv 2102.05426. Whether each weight goes
up or down is learned on a grid that stays (`rounding.adaround`), block by block (`rounding.reconstruct`) or layer by layer on the
Hessian (`rounding.learned`). The baseline of FlexRound, NUPES and others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from dither.formats import WeightScheme
from dither.quant.parts import Part
from dither.quant.recipe import Method
from dither.quant.recipes.flexround import grid_of, scheme_of, steps_of
from dither.quant.rounding.adaround import UpOrDown
from dither.quant.rounding.learned import Learned
from dither.quant.rounding.reconstruct import Reconstruct

BUDGETS = {"quick": (80, 200), "normal": (500, 2000), "paper": (20000, 20000)}  # steps a block, a layer; 20000: BRECQ's code


@dataclass(frozen=True, kw_only=True)
class AdaRound(Method):
    """``level``: "block" (BRECQ) or "layer" (AdaRound, from Hessians). ``budget``: "quick", "normal" or "paper" choose steps, unless ``steps``
    does. ``lr``: None takes 1e-3 in the paper's budget, else 1e-2. ``penalty``: lambda of the regulariser, in units of the start's loss a weight.
    ``clip``: the grid,
    "none" = min-max, "power" = least L_2.4 error, "output" = least output error."""

    name: ClassVar[str] = "adaround"
    source: ClassVar[str] = "arXiv 2004.10568, arXiv 2102.05426"

    blocks: str = "group"  # weights that share a scale: "group" (of ``group`` inputs, or a row), or "tensor", the paper's main setting
    level: str = "block"
    budget: str = "normal"
    steps: int | None = None
    batch: int = 2  # sequences a step; the paper's 32 are images
    lr: float | None = None
    penalty: float = 3.0  # the paper's 0.01 belongs to a loss that is not normalised
    warmup: float = 0.2  # BRECQ's code: share of the steps without regulariser
    keep_best: bool = True
    clip: str = "none"

    def scheme(self) -> WeightScheme:
        return scheme_of(self, self.blocks)

    def stages(self) -> Sequence[Part]:
        steps = steps_of(self.budget, self.level, self.steps, BUDGETS)
        soft = UpOrDown(penalty=self.penalty, warmup=self.warmup)
        lr = self.lr if self.lr is not None else 1e-3 if self.budget == "paper" else 1e-2
        if self.level == "layer":
            return [grid_of(self.clip), Learned(soft, steps, lr, self.keep_best)]
        return [grid_of(self.clip), Reconstruct(soft, steps, lr, self.batch, keep_best=self.keep_best)]
