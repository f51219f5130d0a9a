"""Weights that a model knows under several names: modules that share a parameter, one module that is registered in several places.

Blocks are rounded and stored one at a time, and what rounds a weight looks at its inputs, which differ from place to place. So names of one
weight in two blocks become weights of their own; so do layers of one block that share a parameter, and whatever the loader of the checkpoint
would not share again. Each copy is stored, and its bits are counted. What stays shared, and is stored once: a head and its embedding, vectors,
and a module that one block calls several times.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dither.errors import ModelError
from dither.models import skeleton
from dither.models.memory import MemorySource
from dither.models.source import Source, tied_names

_LISTED = 4  # names in a note

Place = tuple[str, nn.Module]  # the full name of a tensor, and the module that holds it


@dataclass
class Shares:
    """Names of tensors that have an earlier name -> that name. ``apart``: to become tensors of their own; ``together``: stay one tensor."""

    apart: dict[str, str] = field(default_factory=dict)
    together: dict[str, str] = field(default_factory=dict)

    def notes(self) -> list[str]:
        """What the user should know, one line a kind."""
        found = []
        if self.apart:
            found.append(f"weights that are one tensor in the float model, now stored once under each name: {_listed(self.apart)}")
        if self.together:
            found.append(f"weights of modules that the model holds in several places, stored once: {_listed(self.together)}")
        return found


def find_shares(source: Source, model: nn.Module, blocks: Sequence[str]) -> Shares:
    """Which names of one tensor ``model`` (a skeleton of ``source``) may keep sharing it. ``blocks``: full names; none: the model is one block.

    Raises ModelError where blocks share a weight and a loader, which builds the model anew from its configuration, would share it again.
    """
    groups = [(tensor, places) for tensor, places in _places(model) if len(places) > 1]
    foreign = not hasattr(source.config, "model_type")  # its loader is given such a module, and told what to separate
    rebuilt = _rebuilt(source, model, [name for _, places in groups for name, _ in places])
    found = Shares()
    for tensor, places in groups:
        first, holder = places[0]
        table = any(isinstance(part, nn.Embedding) for _, part in places)
        for name, part in places[1:]:
            same, again = part is holder, rebuilt(name, first)
            here, there = _block_of(name, blocks), _block_of(first, blocks)
            if not same and not isinstance(tensor, nn.Parameter):
                continue  # a mask, say, that many modules were given: it never changes
            if again is False:
                apart = True
            elif here == there:
                a_block = here is not None or not blocks
                apart = a_block and foreign and not same and not table and tensor.dim() > 1
            else:
                apart = here is not None or not same  # else: parts of a block that are within reach from outside too
                if apart and again and not foreign:
                    raise ModelError(
                        f"{source.name}: {first} and {name} are one weight of several blocks by the model's architecture, which cannot be "
                        "quantized block by block; give it as a plain module without config"
                    )
            if apart:
                found.apart[name] = first
            elif same and not table:
                found.together[name] = first
    return found


def separate(model: nn.Module, names: Collection[str]) -> None:
    """Give each of ``names`` (full names of parameters and buffers) a tensor of its own, in place. On the way to one, a module that has an earlier
    name becomes a copy, which shares the rest of its parameters with the original. Names that the model lacks are passed over."""
    first = {id(part): path for path, part in model.named_modules()}
    for name in names:
        path, _, leaf = name.rpartition(".")
        holder: nn.Module | None = model
        walked: list[str] = []
        for key in path.split(".") if path else ():
            walked.append(key)
            child = None if holder is None else holder._modules.get(key)
            if holder is not None and child is not None and first.get(id(child)) not in (None, ".".join(walked)):
                child = holder._modules[key] = _copied(child, model)
            holder = child
        old = None if holder is None else holder._parameters.get(leaf, holder._buffers.get(leaf))
        if holder is None or old is None:
            continue
        if isinstance(old, nn.Parameter):
            holder._parameters[leaf] = nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad)
        else:
            holder._buffers[leaf] = old.clone()
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}  # transformers would tie them again
    for alias in [a for a, owner in ties.items() if not {a, owner}.isdisjoint(names)]:
        del ties[alias]


class UntiedSource(Source):
    """``original``, with tensors of their own under the names ``apart`` (name -> the name that ``original`` knows it by)."""

    def __init__(self, original: Source, apart: Mapping[str, str]) -> None:
        self.original, self.apart = original, dict(apart)
        self.name, self.config, self.dtype, self.notes = original.name, original.config, original.dtype, original.notes
        self.generation_config = original.generation_config
        self.tied = tied_names(self.skeleton())

    def names(self) -> list[str]:
        known = self.original.names()
        return [*known, *(name for name in self.apart if name not in set(known))]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.original.shape(self.apart.get(name, name))

    def dtype_of(self, name: str) -> torch.dtype:
        return self.original.dtype_of(self.apart.get(name, name))

    def _read(self, name: str, dtype: torch.dtype | None) -> Tensor:
        return self.original._read(self.apart.get(name, name), dtype)

    def skeleton(self, attn_implementation: str = "sdpa", dtype: torch.dtype | None = None) -> nn.Module:
        model = self.original.skeleton(attn_implementation, dtype)
        separate(model, self.apart)
        return model

    def tokenizer(self) -> Any:
        return self.original.tokenizer()

    def fingerprint(self) -> str:
        return self.original.fingerprint()

    def sidecars(self) -> Iterator[tuple[str, str | bytes]]:
        return self.original.sidecars()


def _places(model: nn.Module) -> Iterable[tuple[Tensor, list[Place]]]:
    """Each parameter and stored buffer with all of its names, also those by which one module is reached twice."""
    tensors: dict[int, Tensor] = {}
    places: dict[int, list[Place]] = {}
    for path, part in model.named_modules(remove_duplicate=False):
        for key, tensor in [*part._parameters.items(), *part._buffers.items()]:
            if tensor is not None and key not in part._non_persistent_buffers_set:
                tensors[id(tensor)] = tensor
                places.setdefault(id(tensor), []).append((f"{path}.{key}" if path else key, part))
    return [(tensors[i], found) for i, found in places.items()]


def _rebuilt(source: Source, model: nn.Module, shared: Sequence[str]) -> Callable[[str, str], bool | None]:
    """Whether two names of one tensor are one tensor again in the model that a loader starts from; None where that has no such first name."""
    if not isinstance(source, MemorySource) or not hasattr(source.config, "model_type"):
        return lambda name, first: True
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    declared = {*ties, *ties.values()}
    if all(name in declared for name in shared):
        return lambda name, first: True
    try:
        fresh = skeleton.build(source.config, skeleton.auto_class(source.config), "sdpa", torch.float32)
    except (ModelError, ArithmeticError, AttributeError, ImportError, LookupError, TypeError, ValueError):  # what a configuration by hand may lack
        return lambda name, first: name in declared and first in declared
    owner = {name: places[0][0] for _, places in _places(fresh) for name, _ in places}
    return lambda name, first: owner[name] == owner.get(first) if name in owner else None


def _copied(part: nn.Module, model: nn.Module) -> nn.Module:
    """A copy of a module of ``model`` that holds the same parameters, and refers to the same configurations and to the same modules elsewhere."""
    inside = {id(m) for m in part.modules()}
    kept: list[Any] = [m for m in model.modules() if id(m) not in inside]
    kept += [*part.parameters(), *(m.config for m in part.modules() if hasattr(m, "config"))]
    return copy.deepcopy(part, {id(x): x for x in kept})


def _block_of(name: str, blocks: Sequence[str]) -> str | None:
    return next((block for block in blocks if name.startswith(block + ".")), None)


def _listed(names: Mapping[str, str]) -> str:
    shown = [f"{name} (as {first})" for name, first in list(names.items())[:_LISTED]]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
