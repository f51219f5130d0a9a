"""What a whole model allows, found on a part of it: residual streams, and the sites and heads of every block.

`discover` proves streams on all of a model at once, in float64, which for thirty blocks takes minutes and ten times the memory. But that modules
only add to a stream is a property of the code, and blocks of one shape run the same code. So streams are proved on a *cut copy*, with

    of each list of repeated blocks the first two of each shape (class, names and shapes of parameters)
    of tables with more than 8192 rows (and of what is as long: heads, their biases) the first 256

and what holds for a block there is carried over to all of its shape, sites and heads likewise (`discover_block` on one of a shape). The whole
model is examined instead where the cut copy does not run, where blocks share parameters, where equal blocks were not found alike, or where a norm
acts from one block into another. This is an inference; whoever rewrites a model by it should compare its outputs once, as
`quant.transforms.rotate` does.

Cost for SmolLM2-135M: 2 of 30 blocks in float64, and one run of the model to see the calls of its blocks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from dither.graph.discovery import discover, discover_block
from dither.graph.exact import Call, as_call, execute
from dither.graph.heads import HeadRotation, find_head_rotations
from dither.graph.keys import KeyScaling, find_key_scalings
from dither.graph.structure import Residual, Site, Structure, Weight
from dither.graph.tree import map_tensors

KEPT = 2  # blocks of a shape; one alone would be no chain
LONG, ROWS = 8192, 256  # tables above LONG rows are cut to ROWS

Shape = tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class BlockSites:
    """A block and what may be done inside it; names in the records are inside the block."""

    name: str
    structure: Structure
    heads: list[HeadRotation] = field(default_factory=list)
    keys: list[KeyScaling] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Whole:
    """Streams (full names), blocks in order, and (first block of a chain, why its stream may not be rotated)."""

    residuals: list[Residual]
    blocks: list[BlockSites]
    refused: list[tuple[str, str]]


def discover_whole(model: nn.Module, sample: Any, *, seed: int = 0) -> Whole:
    """The streams, sites and heads of a ``model`` in evaluation mode, from one ``sample`` (as `discover` takes it). The model is not changed."""
    with torch.enable_grad():  # structure is traced by gradients
        found = _by_cut(model, sample, seed) or _by_all(model, sample, seed)
        residuals, paths, refused = found
        return Whole(residuals, _blocks(model, sample, paths, seed), refused)


Found = tuple[list[Residual], list[str], list[tuple[str, str]]]  # streams, names of the lists of blocks, what was refused


def _by_all(model: nn.Module, sample: Any, seed: int) -> Found:
    return _found(discover(model, sample, seed=seed))


def _found(structure: Structure) -> Found:
    names = {b.name for b in structure.blocks}
    paths = list(dict.fromkeys(b.name.rpartition(".")[0] for b in structure.blocks))
    return structure.residuals, paths, [(n, why) for n, why in structure.unproved if n in names and "stream" in why]


def _by_cut(model: nn.Module, sample: Any, seed: int) -> Found | None:
    """From a cut copy; None where that tells nothing of the whole."""
    lists = _lists(model)
    if not any(len(kept) < len(model.get_submodule(path)) for path, kept in lists.items()) or _shares(model, lists):  # type: ignore[arg-type]
        return None
    cut, rows = _cut(model, lists)
    call = as_call(map_tensors(sample, lambda t: t if rows is None or t.is_floating_point() or t.is_complex() else t % rows))
    if not _runs(cut, call):
        return None
    residuals, paths, refused = _found(discover(cut, call[1] if call[1] else call[0], seed=seed))
    if any(path not in lists and any(path.startswith(f"{p}.") for p in lists) for path in paths):
        return None
    spread = _Spread(model, lists)
    whole = [spread.residual(one) for one in residuals]
    return None if any(one is None for one in whole) else ([one for one in whole if one is not None], paths, refused)


# -- cutting ------------------------------------------------------------------------------------------------------------


def _shape(block: nn.Module) -> Shape:
    return (type(block), tuple((n, tuple(p.shape)) for n, p in block.named_parameters()))


def _lists(model: nn.Module) -> dict[str, list[int]]:
    """The outermost lists of composite modules, and which of their members stay: the first few of each shape."""
    found: dict[str, list[int]] = {}
    for name, part in model.named_modules():
        if type(part) is not nn.ModuleList or not name or any(name.startswith(f"{n}.") for n in found):
            continue
        if len(part) and all(any(True for _ in m.children()) and any(True for _ in m.parameters()) for m in part):
            shapes = [_shape(m) for m in part]
            found[name] = [i for i, s in enumerate(shapes) if shapes[:i].count(s) < KEPT]
    return found


def _shares(model: nn.Module, lists: Mapping[str, Any]) -> bool:
    """Whether a parameter inside the lists is known under several names."""
    owners: dict[int, int] = {}
    for _, p in model.named_parameters(remove_duplicate=False):
        owners[id(p)] = owners.get(id(p), 0) + 1
    return any(owners[id(p)] > 1 for path in lists for p in model.get_submodule(path).parameters())


def _cut(model: nn.Module, lists: Mapping[str, list[int]]) -> tuple[nn.Module, int | None]:
    """The cut copy, which shares the parameters that it keeps whole, and how many rows its long tables have left (None: there are none)."""
    long = {len(m.weight) for m in model.modules() if isinstance(m, nn.Embedding) and len(m.weight) > LONG}
    inside = {id(p) for path in lists for p in model.get_submodule(path).parameters()}
    memo: dict[int, Any] = {}
    for p in model.parameters():
        short = id(p) not in inside and p.dim() > 0 and p.shape[0] in long
        memo[id(p)] = nn.Parameter(p.detach()[:ROWS], requires_grad=p.requires_grad) if short else p
    whole = {path: model.get_submodule(path) for path in lists}
    try:
        for path, kept in lists.items():
            _put(model, path, nn.ModuleList([whole[path][i] for i in kept]))  # type: ignore[index]
        cut = copy.deepcopy(model, memo)
    finally:
        for path, part in whole.items():
            _put(model, path, part)
    for module in cut.modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None and module.padding_idx >= len(module.weight):
            module.padding_idx = None
    return cut, ROWS if long else None


def _put(model: nn.Module, path: str, part: nn.Module) -> None:
    owner, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(owner), leaf, part)


def _runs(model: nn.Module, call: Call) -> bool:
    try:
        with torch.no_grad():
            execute(model, [call])
    except Exception:  # a model may count its blocks or words in ways of its own
        return False
    return True


# -- from the cut copy to the whole model ---------------------------------------------------------------------------------


class _Spread:
    """Carries names over: what holds for a kept block holds for all of its shape."""

    def __init__(self, model: nn.Module, lists: Mapping[str, list[int]]) -> None:
        self.kept: dict[str, list[Shape]] = {}  # by list: the shapes of the kept blocks, as numbered in the cut copy
        self.all: dict[str, dict[Shape, list[int]]] = {}  # by list: the blocks of each shape in the model
        for path, kept in lists.items():
            shapes = [_shape(m) for m in model.get_submodule(path).children()]
            self.kept[path] = [shapes[i] for i in kept]
            self.all[path] = {s: [i for i, other in enumerate(shapes) if other == s] for s in shapes}

    def place(self, name: str) -> tuple[str, int, str] | None:
        """(list, number in the cut copy, rest of the name); None of what lies outside all lists."""
        for path in self.kept:
            if name.startswith(f"{path}."):
                number, _, rest = name[len(path) + 1 :].partition(".")
                return path, int(number), rest
        return None

    def residual(self, found: Residual) -> Residual | None:
        if any(self.place(name) is not None for pair in found.ties for name in pair):
            return None
        writers = self.each(found.writers, lambda w: [w.parameter], lambda w, f: replace(w, parameter=f(w.parameter)), _weight_key)
        readers = self.each(found.readers, lambda w: [w.parameter], lambda w, f: replace(w, parameter=f(w.parameter)), _weight_key)
        norms = self.each(found.norms, _site_names, _renamed, _site_key)
        if writers is None or readers is None or norms is None:
            return None
        return replace(found, writers=tuple(writers), readers=tuple(readers), norms=tuple(norms))

    def each(
        self,
        records: tuple[Any, ...],
        names: Callable[[Any], list[str]],
        rename: Callable[[Any, Callable[[str], str]], Any],
        key: Callable[[Any], Any],
    ) -> list[Any] | None:
        """The records with every block that they stand for; None where one spans blocks, or where blocks of a shape have different ones."""
        outside: list[Any] = []
        inside: dict[tuple[str, int], list[Any]] = {}
        for record in records:
            places = [self.place(name) for name in names(record)]
            blocks = {None if p is None else p[:2] for p in places}
            if len(blocks) > 1:
                return None
            block = blocks.pop()
            (outside if block is None else inside.setdefault(block, [])).append(record)
        result = outside
        for path, shapes in self.kept.items():
            by_shape: dict[Shape, list[Any]] = {}
            for number, shape in enumerate(shapes):
                mine = [rename(r, _inside(path, number)) for r in inside.get((path, number), [])]
                if shape not in by_shape:
                    by_shape[shape] = mine
                elif {key(r) for r in by_shape[shape]} != {key(r) for r in mine}:
                    return None
            for shape, mine in by_shape.items():
                for i in self.all[path][shape]:
                    result += [rename(r, _outside(path, i)) for r in mine]
        return result


def _inside(path: str, number: int) -> Callable[[str], str]:
    return lambda name: name.removeprefix(f"{path}.{number}.")


def _outside(path: str, number: int) -> Callable[[str], str]:
    return lambda name: f"{path}.{number}.{name}"


def _weight_key(weight: Weight) -> Any:
    return weight


def _site_key(site: Site) -> Any:
    return site.producer.parameter, tuple(c.parameter for c in site.consumers)


def _site_names(site: Site) -> list[str]:
    return [site.producer.parameter, *(c.parameter for c in site.consumers)]


def _renamed(site: Site, f: Callable[[str], str]) -> Site:
    def maybe(name: str | None) -> str | None:
        return None if name is None else f(name)

    p = site.producer
    consumers = tuple(
        replace(c, name=f(c.name), parameter=f(c.parameter), layer=maybe(c.layer), bias=maybe(c.bias)) for c in site.consumers
    )
    return Site(site.kind, replace(p, name=f(p.name), parameter=f(p.parameter), bias=maybe(p.bias)), consumers)


# -- blocks ---------------------------------------------------------------------------------------------------------------


def _blocks(model: nn.Module, sample: Any, paths: list[str], seed: int) -> list[BlockSites]:
    """Sites and heads of all blocks in the lists ``paths``; one block of each shape is examined."""
    members = [(f"{path}.{n}", m) for path in paths for n, m in model.get_submodule(path).named_children()]
    first: dict[Shape, nn.Module] = {}
    for _, module in members:
        first.setdefault(_shape(module), module)
    calls: dict[Shape, Call] = {}

    def note(shape: Shape) -> Callable[..., None]:
        return lambda module, args, kwargs: calls.setdefault(shape, (args, kwargs)) and None

    handles = [m.register_forward_pre_hook(note(s), with_kwargs=True) for s, m in first.items()]
    try:
        with torch.no_grad(), _without_caches(model):
            execute(model, [as_call(sample)])
    finally:
        for handle in handles:
            handle.remove()
    found: dict[Shape, tuple[Structure, list[HeadRotation], list[KeyScaling]]] = {}
    for shape, module in first.items():
        if shape in calls:
            structure = discover_block(module, [calls[shape]], seed=seed)
            heads = find_head_rotations(module, [calls[shape]], structure, seed=seed)
            sizes = sorted({h.size for h in heads}, reverse=True)
            found[shape] = structure, heads, find_key_scalings(module, [calls[shape]], structure, sizes, seed=seed)
    return [BlockSites(name, *found[_shape(m)]) for name, m in members if _shape(m) in found]


@contextmanager
def _without_caches(model: nn.Module) -> Iterator[None]:
    """A cache among a block's arguments would be filled by every run of the block."""
    found: list[Any] = [getattr(m, "config", None) for m in model.modules()]
    configs = {id(c): c for c in found if getattr(c, "use_cache", None)}
    for config in configs.values():
        config.use_cache = False
    try:
        yield
    finally:
        for config in configs.values():
            config.use_cache = True
