"""From what the probes found to the records that others use; and why a layer has no site."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from dither.graph.bench import Bench, Evidence, Source
from dither.graph.channel_map import Found
from dither.graph.layers import Affine
from dither.graph.structure import Consumer, Layer, Producer, Site


def allowed(
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


def record(module: nn.Module, bench: Bench, one: Found, layers: Sequence[Layer]) -> Site:
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
    kind = storage(module, source.parameter)
    name = source.parameter if kind == "experts" else owner
    return Producer(
        name,
        source.parameter,
        kind,
        one.rows,
        view.outputs * view.experts,
        bench.bias_of(source.parameter),
        swapped=view.swapped,
    )


def _consumer(bench: Bench, parameter: str, channel_map: Tensor, layer: Layer | None, module: nn.Module) -> Consumer:
    view = bench.matrices[parameter].view
    kind = storage(module, parameter)
    name = parameter if kind == "experts" else parameter.rpartition(".")[0]
    return Consumer(
        name,
        parameter,
        kind,
        channel_map,
        None if layer is None else layer.name,
        view.swapped,
        view.groups,
        bench.bias_of(parameter),
    )


def storage(module: nn.Module, parameter: str) -> str:
    if isinstance(module.get_submodule(parameter.rpartition(".")[0]), _ConvNd):
        return "conv"
    return "experts" if module.get_parameter(parameter).dim() == 3 else "linear"


def can_shift(module: nn.Module, bench: Bench, one: Found, affine: Mapping[str, Affine]) -> bool:
    """Whether the producer and all readers have a bias, or are modules that take one."""
    names = [*one.maps] if one.source.vector else [one.source.parameter, *one.maps]
    for name in names:
        owner = name.rpartition(".")[0]
        takes = isinstance(module.get_submodule(owner), _ConvNd) or (owner in affine and affine[owner].takes_bias)
        if bench.bias_of(name) is None and not takes:
            return False
    return True


def unread_siblings(module: nn.Module, bench: Bench, blocks: Collection[str]) -> dict[str, str]:
    """Read weights that have a never-read twin in a list of equal modules: on another input the twin may read what they read.

    Not so in a chain of ``blocks``, which run one after the other.
    """
    unread: dict[str, str] = {}
    for path, part in module.named_modules():
        if not isinstance(part, nn.ModuleList | nn.ModuleDict):
            continue
        children = {f"{path}.{n}" if path else n: c for n, c in part.named_children()}
        if any(n in blocks for n in children):
            continue
        idle = [
            n
            for n, c in children.items()
            if any(True for _ in c.parameters()) and not any(p.startswith(n + ".") for p in bench.matrices)
        ]
        busy_types = {type(c) for n, c in children.items() if n not in idle}
        twin = next((n for n in idle if type(children[n]) in busy_types), None)
        if twin is not None:
            for parameter in bench.matrices:
                if parameter.startswith(f"{path}." if path else ""):
                    unread[parameter] = f"{twin} was not run on the sample, and may read the same tensor"
    return unread


def reasons(
    layers: Sequence[Layer],
    sites: Sequence[Site],
    bench: Bench,
    candidates: Mapping[Source, Evidence],
    failed: Mapping[Source, str],
    dropped: Mapping[str, str],
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
