"""FlexRound: Learnable Rounding based on Element-wise Division for Post-Training Quantization.

Lee, Kim, Kwon, Lee; ICML 2023; arXiv 2306.00317. Every weight's divisor is learned, together with the grid (`rounding.flexround`), block by
block against the float block's output (`rounding.reconstruct`), or layer by layer on the Hessian (`rounding.learned`).

Cost, block by block: steps x (a forward and backward pass of the block over ``batch`` sequences); on smollm2 (2 x 512 tokens) 0.2 CPU seconds a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from dither.formats import Int, WeightScheme, tensor
from dither.quant.grids import MinMax, OutputClip, PowerClip
from dither.quant.parts import Grid, Part
from dither.quant.recipe import Method
from dither.quant.rounding.flexround import Division
from dither.quant.rounding.learned import Learned
from dither.quant.rounding.reconstruct import Reconstruct

BUDGETS = {"quick": (80, 200), "normal": (500, 2000), "paper": (5000, 5000)}  # steps a block, a layer; 5000: the authors' code


@dataclass(frozen=True, kw_only=True)
class FlexRound(Method):
    """``level``: "block", or "layer" (from Hessians alone; cheap). ``budget``: "quick", "normal" or "paper" choose steps, unless ``steps`` does.
    ``lr``: None takes 3e-3 for blocks (1e-2 in the quick budget from nearest, since few steps have to be large), 5e-3 for layers.
    ``clip``: the grid learning starts on, "none" = min-max, "power" = least L_2.4 error, "output" = least output error. ``start``: "nearest" as in
    the paper, or "gptq": the codes learning starts from, which is worth hundreds of steps. ``rank``: of a low-rank log S2 (LRQ)."""

    name: ClassVar[str] = "flexround"
    source: ClassVar[str] = "arXiv 2306.00317"

    blocks: str = "group"  # weights that share a scale: "group" (of ``group`` inputs, or a row), or "tensor", the paper's main setting
    level: str = "block"
    budget: str = "normal"
    steps: int | None = None
    batch: int = 2  # sequences a step: the authors' code
    lr: float | None = None
    learn_grid: bool = True  # section 3.2: s1 is learned jointly
    keep_best: bool = True
    clip: str = "none"  # the authors' scripts for weights only
    start: str = "nearest"
    rank: int | None = None

    def scheme(self) -> WeightScheme:
        return scheme_of(self, self.blocks)

    def stages(self) -> Sequence[Part]:
        steps = steps_of(self.budget, self.level, self.steps, BUDGETS)
        soft = Division(learn_grid=self.learn_grid, rank=self.rank)
        if self.level == "layer":
            rounding: Part = Learned(soft, steps, 5e-3 if self.lr is None else self.lr, self.keep_best, self.start)
        else:
            few = self.budget == "quick" and self.start == "nearest"
            lr = self.lr if self.lr is not None else 1e-2 if few else 3e-3
            rounding = Reconstruct(soft, steps, lr, self.batch, keep_best=self.keep_best, start=self.start)
        return [grid_of(self.clip), rounding]


def steps_of(budget: str, level: str, steps: int | None, budgets: dict[str, tuple[int, int]]) -> int:
    """The steps a method takes. Raises ValueError for names it does not know."""
    if budget not in budgets:
        raise ValueError(f"budget must be one of {', '.join(budgets)}, not {budget!r}")
    if level not in ("block", "layer"):
        raise ValueError(f"level must be 'block' or 'layer', not {level!r}")
    return budgets[budget][level == "layer"] if steps is None else steps


def scheme_of(method: Method, blocks: str) -> WeightScheme:
    """The scheme of a method's shared knobs, or one scale for the whole tensor. Raises ValueError for names it does not know."""
    if blocks not in ("group", "tensor"):
        raise ValueError(f"blocks must be 'group' or 'tensor', not {blocks!r}")
    if blocks == "group" or method.weights is not None:
        return Method.scheme(method)
    return Int(method.bits, sym=method.sym, scale=method.scale) @ tensor()


def grid_of(clip: str) -> Grid:
    """The grid that learning starts on. Raises ValueError for names it does not know."""
    grids: dict[str, Grid] = {"none": MinMax(), "power": PowerClip(), "output": OutputClip(spare_attention=False)}
    if clip not in grids:
        raise ValueError(f"clip must be one of {', '.join(grids)}, not {clip!r}")
    return grids[clip]
