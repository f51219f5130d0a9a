"""From the tensors of a checkpoint to the parameters of a module, where the two do not match one to one.

Checkpoints name and cut tensors as their authors did (one matrix an expert); transformers' modules may want others (one
stack of experts). transformers keeps the rules as data; here they are turned into a plan, so that one parameter can be
made from just the tensors it needs. The shapes and types of what comes out are found by running the rules on meta
tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Stored = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # shape and type of every tensor of a checkpoint


@dataclass
class Recipe:
    """How one parameter comes about: ``inputs`` (checkpoint name, rule's pattern) through ``rule``; no rule: the tensor
    as it is."""

    target: str
    inputs: list[tuple[str, str]] = field(default_factory=list)
    rule: Any = None

    def make(self, read: Callable[[str], Tensor], model: nn.Module) -> dict[str, Tensor]:
        """All parameters that this rule makes of these inputs, by name. ``read`` gives a checkpoint tensor."""
        if self.rule is None:
            return {self.target: read(self.inputs[0][0])}
        rule = copy.deepcopy(self.rule)
        for key, pattern in self.inputs:
            rule.add_tensor(self.target, key, pattern, partial(read, key))
        made = rule.convert(self.target, model=model, config=getattr(model, "config", None))
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


@dataclass(frozen=True)
class Made:
    """What a recipe makes under one name."""

    recipe: Recipe
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def plan(stored: Stored, model: nn.Module, rules: Sequence[Any]) -> tuple[dict[str, Made], list[str]]:
    """``(what makes each name of the module, checkpoint names that nothing needs)``.

    ``rules``: transformers' weight transforms.
    Any exception means that the rules cannot be run one parameter at a time.
    """
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    wanted = model.state_dict()
    prefix = getattr(model, "base_model_prefix", None)
    rules = copy.deepcopy(list(rules))
    renamings = [r for r in rules if isinstance(r, WeightRenaming)]
    converters = [r for r in rules if isinstance(r, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    recipes: dict[str, Recipe] = {}
    unused: list[str] = []
    for key in sorted(stored, key=dot_natural_key):  # some rules need this order
        target, pattern = rename_source_key(key, renamings, converters, prefix, wanted)
        if target not in wanted and key in wanted:
            target, pattern = rename_source_key(key, [], [], prefix, wanted)
        if target not in wanted:
            unused.append(key)
            continue
        rule = None if pattern is None else by_pattern[pattern]
        recipe = recipes.setdefault(target, Recipe(target, rule=rule))
        recipe.inputs.append((key, pattern or key))

    made: dict[str, Made] = {}
    for recipe in recipes.values():
        results = recipe.make(lambda key: torch.empty(stored[key][0], dtype=stored[key][1], device="meta"), model)
        for name, value in results.items():
            made[name] = Made(recipe, name, tuple(value.shape), value.dtype)
    return made, unused
