"""The drawers that recipes are assembled from: transforms, grids, roundings. A part is a frozen record of its knobs plus one verb.

    Transform.apply(block)                      rewrite float weights so that the float function stays the same
    Grid.fit(weight, scheme, statistics)        choose each block's scale and zero point
    Rounding.round(weight, scheme, params, statistics)   choose the codes on that grid

Each part names the statistics it needs; the engine gathers their union once a block, and hands them to all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dither.formats import Params, QTensor, Scheme
from dither.graph import Structure
from dither.quant.statistics import Statistics
from dither.quant.walker import Call


@dataclass(frozen=True)
class Rounded:
    """A rounded weight and what is worth telling about how it came to be."""

    tensor: QTensor
    loss: float | None = None  # the rounding's own objective, summed over the matrix
    damp: float | None = None  # damping that was needed, relative to the mean of the Hessian's diagonal
    fallback: str | None = None  # why another rounding than the asked one was used


@dataclass(frozen=True)
class Part:
    """What all parts share: the statistics of a layer's input that they read (see `quant.statistics`)."""

    needs: ClassVar[frozenset[str]] = frozenset()
    uses_sites: ClassVar[bool] = False  # whether it wants the block's sites proved


class Grid(Part, ABC):
    """Chooses scales and zero points; the codes come later."""

    spare_attention: bool = False  # leave layers that feed the attention logits on the min-max grid

    @abstractmethod
    def fit(self, weight: Tensor, scheme: Scheme, statistics: Statistics | None) -> Params:
        """``weight [O, I]`` float32 -> grid parameters, each ``scheme.blocks.grid_shape(O, I)``."""


class Rounding(Part, ABC):
    """Chooses the codes."""

    @abstractmethod
    def round(self, weight: Tensor, scheme: Scheme, params: Params, statistics: Statistics | None) -> Rounded:
        """``weight [O, I]`` float32 on the grid ``params`` -> codes."""


class Transform(Part, ABC):
    """Rewrites a block's float weights at proved sites. ``tokens``: how many tokens' arguments of the captured modules it wants."""

    uses_sites: ClassVar[bool] = True
    tokens: int = 0

    @abstractmethod
    def captures(self, block: BlockView) -> Collection[str]:
        """Names of the submodules ("" is the block) whose arguments the float pass is to keep for `apply`."""

    @abstractmethod
    def apply(self, block: BlockView) -> None:
        """Change ``block.module`` in place, keep its float function; append findings to ``block.findings``."""


@dataclass
class BlockView:
    """What a transform sees of the block at hand.

    ``module`` holds float32 weights; ``float_calls`` are the float model's inputs in the compute type; ``inputs_of(name)`` are the
    arguments that a submodule got from the first of them.
    """

    index: int
    name: str
    module: nn.Module
    structure: Structure
    statistics: dict[str, Statistics]  # by layer name; layers that read one tensor share one object
    schemes: dict[str, Scheme]  # of the layers to be quantized
    compute: torch.dtype
    search_calls: dict[str, list[Call]]  # by submodule name ("" is the block): the arguments it was called with
    spared: frozenset[str] = frozenset()
    findings: list[dict[str, Any]] = field(default_factory=list)
