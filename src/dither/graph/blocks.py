"""The repeated modules of a model: lists whose members are run one after the other, each on what the one before returned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from dither.graph.exact import Call, Exact, execute
from dither.graph.tree import tensors_of


@dataclass(eq=False)
class _Run:
    """What went into a module and came out of it the first time. The tensors are kept, so that addresses stay unique."""

    order: int
    inputs: list[Tensor]
    outputs: list[Tensor]

    def feeds(self, later: _Run) -> bool:
        mine = {_address(t) for t in self.outputs}
        return any(_address(t) in mine for t in later.inputs)


def _address(t: Tensor) -> tuple[int, int, int]:
    return t.untyped_storage().data_ptr(), int(t.storage_offset()), t.numel()


def find_chains(model: nn.Module, calls: Sequence[Call]) -> list[list[str]]:
    """Names of the blocks, chain by chain, in the order in which they run.

    A chain is an ``nn.ModuleList`` or ``nn.Sequential`` of composite modules in which most members hand their output to the next one.
    Experts do not (they run side by side); stages of different shape that are chains themselves are not blocks but
    hold them.
    """
    lists = [
        (name, part)
        for name, part in model.named_modules()
        if isinstance(part, nn.ModuleList | nn.Sequential) and len(part) > 1
    ]
    runs = _watch(model, calls, [child for _, part in lists for child in part.children()])
    names = {id(m): n for n, m in model.named_modules()}
    chains = {}
    for name, part in lists:
        ran = sorted((c for c in part.children() if id(c) in runs), key=lambda c: runs[id(c)].order)
        composite = [c for c in ran if any(True for _ in c.children()) and any(True for _ in c.parameters())]
        links = sum(runs[id(a)].feeds(runs[id(b)]) for a, b in pairwise(composite))
        if len(composite) > 1 and 2 * links >= len(composite) - 1 and links > 0:
            chains[name] = composite
    chosen: list[list[str]] = []
    taken: list[str] = []
    for name, members in chains.items():  # outer lists come before the lists inside them
        if any(name.startswith(f"{t}.") for t in taken):
            continue
        inner = any(other.startswith(f"{names[id(m)]}.") for m in members for other in chains)
        if inner and not _alike(members):
            continue
        chosen.append([names[id(m)] for m in members])
        taken += chosen[-1]
    by_name = dict(model.named_modules())
    chosen.sort(key=lambda chain: runs[id(by_name[chain[0]])].order)
    return chosen


def _alike(members: Sequence[nn.Module]) -> bool:
    """Whether two members have one class and agree in the shapes of most of their parameters."""
    shapes = [(type(m), {(n, tuple(p.shape)) for n, p in m.named_parameters()}) for m in members]
    return any(
        kind is other and 2 * len(mine & yours) > max(len(mine), len(yours))
        for i, (kind, mine) in enumerate(shapes)
        for other, yours in shapes[:i]
    )


def _watch(model: nn.Module, calls: Sequence[Call], modules: Sequence[nn.Module]) -> dict[int, _Run]:
    runs: dict[int, _Run] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        runs.setdefault(id(module), _Run(len(runs), tensors_of([args, kwargs]), tensors_of(output)))

    handles = [m.register_forward_hook(note, with_kwargs=True) for m in modules]
    try:
        with torch.no_grad(), Exact():
            execute(model, calls)
    finally:
        for handle in handles:
            handle.remove()
    return runs
