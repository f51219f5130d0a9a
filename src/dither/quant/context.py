"""What every step of one run shares: where weights come from, what is to be done with them, and what model stages left for run time."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from dither import models
from dither.formats import WeightScheme
from dither.quant.inputs import InputQuant
from dither.quant.outcome import Event
from dither.quant.recipe import Recipe


@dataclass
class Context:
    """``source`` changes where a model stage rewrote the model. ``samples``: sequences or images of the calibration data; ``blocks``: how many
    there are; ``turns``: layer -> order of the Hadamard matrix on its input; ``inputs``: how a layer's input is rounded, by full name."""

    source: models.Source
    recipe: Recipe
    compute: torch.dtype
    seed: int
    samples: int
    progress: Callable[[Event], None]
    blocks: int = 0
    turns: dict[str, int] = field(default_factory=dict)
    inputs: dict[str, InputQuant] = field(default_factory=dict)

    def dtype_of(self, name: str) -> torch.dtype:
        """The storage type of a tensor; what a transform added (a bias) takes the model's."""
        return self.source.dtype_of(name) if self.source.has(name) else self.source.dtype

    def is_original(self, name: str) -> bool:
        """Whether the model had this tensor before any stage rewrote it."""
        original = self.source.original if isinstance(self.source, models.RewrittenSource) else self.source
        return original.has(name)

    def aliases(self, parameter: str) -> list[str]:
        """Other names of a tensor that is stored under this one."""
        return [alias for alias, owner in self.source.tied.items() if owner == parameter]

    def known_as(self, name: str) -> str:
        """A layer's name in the float model, where the layer may have been turned (`online.Turned`)."""
        owner = name.rpartition(".")[0]
        return owner if owner in self.turns else name

    def override(self, name: str) -> WeightScheme | None:
        """The scheme that the recipe asks for by name."""
        return next((scheme for pattern, scheme in self.recipe.overrides if fnmatch.fnmatchcase(name, pattern)), None)

    def skips(self, name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.recipe.skip)
