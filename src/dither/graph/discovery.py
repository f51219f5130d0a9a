"""`discover` and `discover_block`: run, prove, verify, and write down what was found."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.module import register_module_forward_hook

from dither.graph.blocks import find_chains
from dither.graph.exact import (
    Call, Exact, as_call, bench_copy, exact_calls, execute, float64_default, randomize, relative_difference, run_exactly, untie,
)
from dither.graph.fold import apply_scale, apply_shift
from dither.graph.probe import Bench, Evidence, Found, Source
from dither.graph.residual import NotProved, find_residual
from dither.graph.structure import Block, Consumer, Layer, Producer, Site, Structure, Weight

EXACT = 1e-9  # relative difference of outputs up to which a rewrite counts as leaving the function unchanged


@dataclass(frozen=True)
class Affine:
    """A module proved to compute x W^T + b of its one matrix and vector."""

    parameter: str
    swapped: bool
    bias: str | None
    takes_bias: bool


def discover(model: nn.Module, sample: Any, *, seed: int = 0) -> Structure:
    """Blocks, layers, groups, sites and residual streams of a model, from one ``sample``: a tensor, a tuple of arguments, or a dict
    of named ones (a few dozen tokens, or an image or two). The model is not changed; a float64 copy of it is made.

    TypeError for a sample of another kind. Deterministic under ``seed``.
    """
    with float64_default():
        bench = bench_copy(model)
        ties = untie(bench)
        calls = exact_calls([as_call(sample)])
        randomize(bench, torch.Generator().manual_seed(seed))
        chains = find_chains(bench, calls)
        blocks = [Block(name, c, i) for c, chain in enumerate(chains) for i, name in enumerate(chain)]
        cuts = [name for chain in chains for name in chain[:-1]]
        found = _Examined.of(bench, calls, cuts, ties, seed)
        residuals, refused = [], []
        for c, chain in enumerate(chains):
            try:
                residuals.append(find_residual(bench, calls, c, chain, found.norms, ties, found.layouts, found.unread, seed))
            except NotProved as reason:
                refused.append((chain[0], f"its stream cannot be rotated: {reason}"))
    layers = [_placed(layer, blocks, found.leaving) for layer in found.structure.layers]
    return replace(found.structure, layers=layers, blocks=blocks, residuals=residuals, unproved=[*found.structure.unproved, *refused])


def _placed(layer: Layer, blocks: Sequence[Block], leaving: Collection[str]) -> Layer:
    """The layer with its block; outside all blocks, what leaves the model is the head."""
    block = next((i for i, b in enumerate(blocks) if layer.name.startswith(b.name + ".")), None)
    return replace(layer, block=block, is_head=layer.is_head or (block is None and layer.parameter in leaving))


def discover_block(block: nn.Module, calls: Sequence[tuple[Sequence[Any], Mapping[str, Any]]], *, name_prefix: str = "", seed: int = 0) -> Structure:
    """Layers, groups and sites inside one block, given some of its calls ``(args, kwargs)``; ``block`` is not changed.

    A few dozen tokens suffice; at least two are needed. ``name_prefix`` is put before all names. ValueError where ``calls`` is empty.
    """
    if not calls:
        raise ValueError("calls must hold at least one call of the block")
    with float64_default():
        bench = bench_copy(block)
        ties = untie(bench)
        randomize(bench, torch.Generator().manual_seed(seed))
        return _Examined.of(bench, exact_calls([(tuple(a), dict(k)) for a, k in calls]), (), ties, seed).structure.prefixed(name_prefix)


@dataclass(frozen=True, eq=False)
class _Examined:
    """What `discover_block` finds, and what the search for residual streams needs besides."""

    structure: Structure
    norms: list[Site]  # scale sites of vectors, those on tied parameters too
    layouts: dict[str, Weight]
    unread: dict[str, str]
    leaving: set[str]

    @classmethod
    def of(cls, module: nn.Module, calls: list[Call], cuts: Sequence[str], ties: tuple[tuple[str, str], ...], seed: int) -> _Examined:
        """Examine a bench copy, whose weights are overwritten; stretches also end at the outputs of the modules ``cuts``."""
        bench = Bench(module, calls, [module.get_submodule(n) for n in cuts], seed)
        affine = affine_modules(module, calls)
        candidates = bench.candidates()
        found, failed = bench.map_channels(candidates)
        layers = _layers(module, bench, affine, ties)
        unread = _unread_siblings(module, bench)
        records = [(one, _site(module, bench, one, layers)) for one in found if one.source.kind == "scale" or _can_shift(module, bench, one, affine)]
        sites, dropped = _allowed(bench, records, ties, unread)
        sites, unverified = verify(module, calls, sites, bench.generator)
        dropped |= {c.parameter: why for site, why in unverified for c in site.consumers if site.kind == "scale"}
        structure = Structure(layers, sites, unproved=_unproved(layers, sites, bench, candidates, failed, dropped))
        layouts = {n: Weight(n, _kind(module, n), m.view.swapped) for n, m in bench.matrices.items()}
        return cls(structure, [s for _, s in records if s.kind == "scale" and s.producer.is_vector], layouts, unread, bench.leaving)


def verified(structure: Structure, block: nn.Module, calls: Sequence[tuple[Sequence[Any], Mapping[str, Any]]], *, seed: int = 0) -> Structure:
    """The same structure with only those sites that hold on ``block`` too (another block of the same shape)."""
    with float64_default():
        bench = bench_copy(block)
        untie(bench)
        generator = torch.Generator().manual_seed(seed)
        sites, failed = verify(bench, exact_calls([(tuple(a), dict(k)) for a, k in calls]), structure.sites, generator)
    lost = [(c.layer, why) for site, why in failed for c in site.consumers if c.layer is not None and site.kind == "scale"]
    return replace(structure, sites=sites, unproved=[*structure.unproved, *lost])


def layers_of(module: nn.Module) -> Structure:
    """Only the layers, without a sample: each module is run alone on random rows and kept if it computes x W^T + b. Every layer
    is its own group; there are no sites. Stacks of experts are recognised as three-dimensional parameters of modules without submodules."""
    layers: list[Layer] = []
    with float64_default():
        generator = torch.Generator().manual_seed(0)
        for name, part in module.named_modules():
            own = {n: p for n, p in part._parameters.items() if p is not None}
            full = f"{name}." if name else ""
            if isinstance(part, _ConvNd) and not isinstance(part, _ConvTransposeNd):
                layers.append(Layer(
                    name, full + "weight", "conv", part.in_channels, part.out_channels, tuple(part.weight.shape),
                    bias=full + "bias" if part.bias is not None else None, group=len(layers),
                ))
                continue
            affine = _affine_alone(part, name, generator)
            if affine is not None:
                weight = own[affine.parameter.rpartition(".")[2]]
                out, inp = weight.shape[::-1] if affine.swapped else weight.shape
                layers.append(Layer(name, affine.parameter, "linear", inp, out, tuple(weight.shape), affine.swapped, affine.bias, len(layers)))
                continue
            swapped = bool(getattr(part, "is_transposed", False))  # how transformers marks stacks stored [E, I, O]
            for key, p in own.items():
                if p.dim() == 3 and min(p.shape) > 1:
                    out, inp = p.shape[:0:-1] if swapped else p.shape[1:]
                    layers.append(Layer(full + key, full + key, "experts", inp, out, tuple(p.shape), swapped, group=len(layers)))
    return Structure(layers)


def _affine_alone(part: nn.Module, name: str, generator: torch.Generator) -> Affine | None:
    """`is_affine` of a module without submodules, tried on random rows of either width."""
    matrices = [p for p in part._parameters.values() if p is not None and p.dim() == 2]
    if any(True for _ in part.children()) or len(matrices) != 1:
        return None
    alone = bench_copy(part)
    for width in dict.fromkeys(reversed(matrices[0].shape)):
        x = torch.randn(2, 3, width, generator=generator, dtype=torch.float64)
        try:
            with torch.no_grad(), Exact():
                output = alone(x)
        except (RuntimeError, TypeError, IndexError, ValueError, AttributeError):
            continue  # it does not take rows of this width, or takes something else
        if isinstance(output, Tensor) and (found := is_affine(alone, name, x, output)) is not None:
            return found
    return None


# -- verification -------------------------------------------------------------------------------------------------------


def verify(module: nn.Module, calls: list[Call], sites: Sequence[Site], generator: torch.Generator) -> tuple[list[Site], list[tuple[Site, str]]]:
    """Fold random values at the sites into the module's (random) weights; keep those that leave all outputs unchanged.

    All at once; only if that fails, one by one, and then together those that held alone.
    """
    known = {n for n, _ in module.named_parameters()}
    randomize(module, generator)

    def error(chosen: Sequence[Site]) -> float:
        base = run_exactly(module, calls)
        values = [_random_values(site, generator) for site in chosen]
        for site, value in zip(chosen, values, strict=True):
            _fold(module, site, value, undo=False)
        difference = relative_difference(run_exactly(module, calls), base)
        for site, value in zip(reversed(chosen), reversed(values), strict=True):  # a scale and a shift do not commute
            _fold(module, site, value, undo=True)
        return difference

    kept, failed = list(sites), []
    if error(kept) > EXACT:
        alone = [(site, error([site])) for site in sites]
        kept = [site for site, e in alone if e <= EXACT]
        failed = [(site, f"folding it changed the output by {e:.1e}") for site, e in alone if e > EXACT]
        while kept and error(kept) > EXACT:
            failed.append((kept.pop(), "it does not hold together with the other sites"))
    for name in [n for n, _ in module.named_parameters() if n not in known]:  # biases that shifts created
        owner, _, leaf = name.rpartition(".")
        module.get_submodule(owner)._parameters[leaf] = None
    return kept, failed


def _random_values(site: Site, generator: torch.Generator) -> Tensor:
    draw = torch.rand(site.channels, generator=generator, dtype=torch.float64)
    return 2.0 ** (2 * draw - 1) if site.kind == "scale" else 2 * draw - 1


def _fold(module: nn.Module, site: Site, value: Tensor, *, undo: bool) -> None:
    if site.kind == "scale":
        apply_scale(module, site, 1 / value if undo else value)
    else:
        apply_shift(module, site, -value if undo else value)


# -- layers -------------------------------------------------------------------------------------------------------------


def affine_modules(module: nn.Module, calls: Sequence[Call]) -> dict[str, Affine]:
    """Modules with one matrix whose output equals x W^T + b on the calls, by name."""
    names = {id(m): n for n, m in module.named_modules()}
    found: dict[str, Affine] = {}
    refuted: set[str] = set()

    def look(part: nn.Module, args: Any, output: Any) -> None:
        name = names.get(id(part))
        if name is None or name in refuted or not args or not isinstance(output, Tensor):
            return
        proved = is_affine(part, name, args[0], output)
        if proved is None:
            refuted.add(name)
            found.pop(name, None)
        else:
            found[name] = proved

    handle = register_module_forward_hook(look)
    try:
        with torch.no_grad(), Exact():
            execute(module, calls)
    finally:
        handle.remove()
    return found


def is_affine(part: nn.Module, name: str, x: Any, output: Tensor) -> Affine | None:
    """Whether ``output`` is x W^T + b of the matrix that ``part`` itself holds, in either storage order."""
    own = {n: p for n, p in part._parameters.items() if p is not None}
    matrices = [(n, p) for n, p in own.items() if p.dim() == 2]
    vectors = [(n, p) for n, p in own.items() if p.dim() == 1]
    if len(matrices) != 1 or len(matrices) + len(vectors) != len(own) or len(vectors) > 1:
        return None
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return None
    key, w = matrices[0]
    bias = vectors[0] if vectors else None
    for swapped in (False, True):
        matrix = w.mT if swapped else w
        if x.shape[-1] != matrix.shape[1] or output.shape != (*x.shape[:-1], matrix.shape[0]):
            continue
        if bias is not None and bias[1].shape != matrix.shape[:1]:
            continue
        expected = F.linear(x, matrix, None if bias is None else bias[1])
        if relative_difference([output], [expected]) <= EXACT:
            full = f"{name}." if name else ""
            takes = any(p is None for p in part._parameters.values())
            return Affine(full + key, swapped, None if bias is None else full + bias[0], takes)
    return None


def _layers(module: nn.Module, bench: Bench, affine: Mapping[str, Affine], ties: Sequence[tuple[str, str]]) -> list[Layer]:
    """Quantizable weights among those that were read, in call order."""
    tied = {name for pair in ties for name in pair}
    by_parameter = {a.parameter: (name, a) for name, a in affine.items()}
    groups: dict[tuple[tuple[int, ...], ...], int] = {}
    layers = []
    for parameter, matrix in bench.matrices.items():
        group = groups.setdefault(bench.inputs[parameter], len(groups))
        view, weight = matrix.view, module.get_parameter(parameter)
        owner = parameter.rpartition(".")[0]
        marks: dict[str, Any] = {
            "group": group, "shape": tuple(weight.shape), "routes": parameter in bench.routes,
            "feeds_logits": parameter in bench.logits, "is_head": parameter in bench.tables or parameter in tied,
        }
        part = module.get_submodule(owner)
        if parameter in by_parameter:
            name, a = by_parameter[parameter]
            layers.append(Layer(name, parameter, "linear", view.inputs, view.outputs, swapped=a.swapped, bias=a.bias, **marks))
        elif isinstance(part, _ConvNd) and not isinstance(part, _ConvTransposeNd):
            layers.append(Layer(owner, parameter, "conv", view.inputs, view.outputs, bias=bench.bias_of(parameter), **marks))
        elif weight.dim() == 3:
            layers.append(
                Layer(parameter, parameter, "experts", view.inputs, view.outputs, swapped=view.swapped, bias=bench.bias_of(parameter), **marks)
            )
    return layers


# -- sites --------------------------------------------------------------------------------------------------------------


def _allowed(
    bench: Bench, records: Sequence[tuple[Found, Site]], ties: Sequence[tuple[str, str]], unread: Mapping[str, str]
) -> tuple[list[Site], dict[str, str]]:
    """The sites whose parameters serve nothing else, and the readers of the others (parameter -> why)."""
    tied = {name: other for pair in ties for name, other in (pair, pair[::-1])}
    sites: list[Site] = []
    dropped: dict[str, str] = {}
    for one, site in records:
        used = [one.source.parameter, *one.maps]
        why = next((f"{n} is tied to {tied[n]}" for n in used if n in tied), None)
        why = why or next((f"{n} is also an embedding table" for n in used if n in bench.tables), None)
        why = why or next((unread[n] for n in one.maps if n in unread), None)
        if why is None:
            sites.append(site)
        elif site.kind == "scale":
            dropped |= {n: why for n in one.maps}
    order = {n: i for i, n in enumerate(bench.matrices)}
    sites.sort(key=lambda s: (s.kind, min(order[c.parameter] for c in s.consumers)))
    return sites, dropped


def _site(module: nn.Module, bench: Bench, one: Found, layers: Sequence[Layer]) -> Site:
    by_parameter = {layer.parameter: layer for layer in layers}
    consumers = (_consumer(bench, n, m, by_parameter.get(n), module) for n, m in one.maps.items())
    return Site(one.source.kind, _producer(module, bench, one), tuple(consumers))


def _producer(module: nn.Module, bench: Bench, one: Found) -> Producer:
    source = one.source
    owner = source.parameter.rpartition(".")[0]
    if source.vector:
        size = module.get_parameter(source.parameter).numel()
        return Producer(owner, source.parameter, "vector", one.rows, size, source.bias, source.offset)
    view = bench.matrices[source.parameter].view
    kind = _kind(module, source.parameter)
    name = source.parameter if kind == "experts" else owner
    return Producer(name, source.parameter, kind, one.rows, view.outputs * view.experts, bench.bias_of(source.parameter), swapped=view.swapped)


def _consumer(bench: Bench, parameter: str, channel_map: Tensor, layer: Layer | None, module: nn.Module) -> Consumer:
    view = bench.matrices[parameter].view
    kind = _kind(module, parameter)
    name = parameter if kind == "experts" else parameter.rpartition(".")[0]
    return Consumer(
        name, parameter, kind, channel_map, None if layer is None else layer.name, view.swapped, view.groups, bench.bias_of(parameter)
    )


def _kind(module: nn.Module, parameter: str) -> str:
    if isinstance(module.get_submodule(parameter.rpartition(".")[0]), _ConvNd):
        return "conv"
    return "experts" if module.get_parameter(parameter).dim() == 3 else "linear"


def _can_shift(module: nn.Module, bench: Bench, one: Found, affine: Mapping[str, Affine]) -> bool:
    """Whether the producer and all readers have a bias, or are modules that take one."""
    names = [*one.maps] if one.source.vector else [one.source.parameter, *one.maps]
    for name in names:
        owner = name.rpartition(".")[0]
        takes = isinstance(module.get_submodule(owner), _ConvNd) or (owner in affine and affine[owner].takes_bias)
        if bench.bias_of(name) is None and not takes:
            return False
    return True


def _unread_siblings(module: nn.Module, bench: Bench) -> dict[str, str]:
    """Read weights that have a never-read twin in a list of equal modules: on another input the twin may read what they read."""
    unread: dict[str, str] = {}
    for path, part in module.named_modules():
        if not isinstance(part, nn.ModuleList | nn.ModuleDict):
            continue
        children = {f"{path}.{n}" if path else n: c for n, c in part.named_children()}
        idle = [n for n, c in children.items() if any(True for _ in c.parameters()) and not any(p.startswith(n + ".") for p in bench.matrices)]
        busy_types = {type(c) for n, c in children.items() if n not in idle}
        twin = next((n for n in idle if type(children[n]) in busy_types), None)
        if twin is not None:
            for parameter in bench.matrices:
                if parameter.startswith(f"{path}." if path else ""):
                    unread[parameter] = f"{twin} was not run on the sample, and may read the same tensor"
    return unread


def _unproved(
    layers: Sequence[Layer], sites: Sequence[Site], bench: Bench, candidates: Mapping[Source, Evidence],
    failed: Mapping[Source, str], dropped: Mapping[str, str],
) -> list[tuple[str, str]]:
    """Each layer that no scale site feeds, with the most telling reason."""
    fed = {c.parameter for site in sites if site.kind == "scale" for c in site.consumers}
    reasons = dict(dropped)
    for source, why in failed.items():
        for reader in candidates[source].reaches if source.kind == "scale" else ():
            reasons.setdefault(reader, f"{source.parameter}: {why}")
    out = []
    for layer in layers:
        if layer.parameter in fed:
            continue
        if layer.parameter in reasons:
            why = reasons[layer.parameter]
        elif layer.parameter in bench.reached:
            why = "what it reads is not proportional, channel by channel, to the output of one weight or norm"
        else:
            why = "what it reads comes from outside this block"
        out.append((layer.name, why))
    return out
