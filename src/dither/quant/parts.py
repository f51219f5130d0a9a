"""The drawers that recipes are assembled from. A part is a frozen record of its knobs plus one verb.

    ModelStage.apply(view)                      rewrite the whole float model first: rotate its stream, learn transforms
    Transform.apply(block)                      rewrite one block's float weights so that the float function stays the same
    Grid.fit(weight, scheme, statistics)        choose each block's scale and zero point
    Rounding.round(weight, scheme, params, statistics)   choose the codes of one layer (and, where it likes, how its input is rounded)
    BlockRounding.reconstruct(block, ...)       choose the codes of all layers of a block together, against the float block's output

Each part names the statistics it needs; the engine gathers their union once a block, and hands them to all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dither.formats import Params, QTensor, Scheme, WeightScheme
from dither.graph import Structure
from dither.quant.inputs import InputQuant
from dither.quant.statistics import Statistics
from dither.quant.walker import Call


@dataclass(frozen=True)
class Rounded:
    """A rounded weight and what is worth telling about how it came to be."""

    tensor: QTensor
    loss: float | None = None  # the rounding's own objective, summed over the matrix
    damp: float | None = None  # damping that was needed, relative to the mean of the Hessian's diagonal
    fallback: str | None = None  # why another rounding than the asked one was used
    inputs: InputQuant | None = None  # how the layer's input is rounded at run time; None: as the recipe says
    facts: dict[str, Any] = field(default_factory=dict)  # what else is worth reporting, as plain data


@dataclass(frozen=True)
class Task:
    """One layer that a rounding is asked to round: ``weight [O, I]`` float32, its scheme, and its grid (empty where the scheme is none).
    ``is_linear``: whether it can round its input at run time."""

    weight: Tensor
    scheme: Any
    params: Params
    is_linear: bool = True


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

    @property
    def own_grid(self) -> bool:
        """Whether it chooses scales itself, so that what another grid than min-max chose would be lost."""
        return False

    @property
    def float_inputs(self) -> bool:
        """Whether its statistics are those of the float model, rather than of the model as rounded so far."""
        return False

    def aimed_at(self, weight: Tensor, statistics: Statistics | None) -> Tensor:
        """What it rounds in place of ``weight [O, I]``, which its grid is to span: weights that do not matter may have become 0."""
        return weight

    def refuses(self, scheme: WeightScheme) -> str | None:
        """Why it cannot round to ``scheme``; None where it can. Most know grids only."""
        return None if isinstance(scheme, Scheme) else f"{type(self).__name__} rounds to grids of numbers, not to {scheme}"

    @abstractmethod
    def round(self, weight: Tensor, scheme: Any, params: Params, statistics: Statistics | None) -> Rounded:
        """``weight [O, I]`` float32 on the grid ``params`` -> codes. Schemes that are no grids come with empty ``params``."""

    def round_together(self, tasks: Sequence[Task], statistics: Statistics | None) -> list[Rounded]:
        """Layers that read one tensor, in call order. One by one, unless they have a choice in common (how that tensor is rounded)."""
        return [self.round(task.weight, task.scheme, task.params, statistics) for task in tasks]


class BlockRounding(Rounding, ABC):
    """Chooses the codes of a block's layers together. `Rounding.round` is left for layers that are not called as modules."""

    @abstractmethod
    def reconstruct(
        self, block: BlockView, calls: list[Call], targets: list[Tensor], params: dict[str, Params]
    ) -> dict[str, Rounded]:
        """``calls``: the block's arguments in the model as rounded so far; ``targets``: what the float block returns in the float model, one
        a call; ``params``: each layer's grid. Returns what every layer in ``params`` was rounded to. ``block.module`` (float32) is left as it is.
        """


class ModelStage(Part, ABC):
    """Rewrites the whole float model, in memory, before its blocks are walked one by one."""

    needs_batches: ClassVar[bool] = False  # whether it wants calibration data

    @abstractmethod
    def apply(self, view: ModelView) -> None:
        """Change ``view.model`` in place, keep its float function; note what must also happen at run time."""


class Transform(Part, ABC):
    """Rewrites a block's float weights at proved sites. ``tokens``: how many tokens' arguments of the captured modules it wants."""

    uses_sites: ClassVar[bool] = True
    uses_calls: ClassVar[bool] = False  # whether it wants `BlockView.float_calls`, all of the block's inputs
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

    ``module`` holds float32 weights; ``float_calls`` are the block's calls by every batch in the float model, in the compute type, where a transform
    asks for them. A transform may leave what happens at run time: ``inputs``, how a layer's input is rounded (where its rounding says nothing
    of it), and ``attention``, how the operands of an attention module are (`quant.attention_inputs`).
    """

    index: int
    name: str
    module: nn.Module
    structure: Structure
    statistics: dict[str, Statistics]  # by layer name; layers that read one tensor share one object
    schemes: dict[str, WeightScheme]  # of the layers to be quantized
    compute: torch.dtype
    search_calls: dict[str, list[Call]]  # by submodule name ("" is the block): the arguments it was called with
    seed: int = 0
    spared: frozenset[str] = frozenset()
    findings: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    float_calls: list[Call] = field(default_factory=list)
    samples: int = 0  # sequences or images of the calibration data
    slices: dict[str, dict[int, Statistics]] = field(default_factory=dict)  # of layers whose slices have inputs of their own, by slice
    inputs: dict[str, InputQuant] = field(default_factory=dict)  # by layer name
    attention: dict[str, dict[str, InputQuant]] = field(default_factory=dict)  # by module name, by operand
    say: Callable[[str], None] = lambda what: None  # progress within the block, in a few words


@dataclass
class ModelView:
    """What a model stage sees: the float32 model, the calibration batches (model inputs), and what it may leave for run time.

    ``turns``: linear layers whose input is rotated at run time, name -> order of the Hadamard matrix (`quant.online`); the stage has already put
    the module in place. ``rotate_heads``: queries and keys are rotated by a Hadamard matrix before keys are cached. ``remember(name, make)``:
    tensors that took long to find are kept with the unfinished run, so that a stopped run finds them again. ``sample``: inputs of a few tokens
    to prove structure with; None where there are no batches and the model reads anything but tokens. ``inputs``: how a layer's input is rounded
    (by full name; where its rounding says nothing of it).
    """

    model: nn.Module
    batches: list[dict[str, Tensor]]
    recipe: Any  # the Recipe at work
    compute: torch.dtype
    seed: int
    remember: Callable[[str, Callable[[], dict[str, Tensor]]], dict[str, Tensor]]
    say: Callable[[str], None]
    turns: dict[str, int] = field(default_factory=dict)
    rotate_heads: bool = False
    sample: dict[str, Tensor] | None = None
    inputs: dict[str, InputQuant] = field(default_factory=dict)
    findings: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
