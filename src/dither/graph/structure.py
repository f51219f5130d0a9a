"""What `discover` found: blocks, layers, sites, residual streams. Records only; they hold names and index maps, never weights.

Names are paths inside the module that was examined (``model`` below), so a record stays true for any copy of it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn


def matrix_view(weight: Tensor, kind: str, swapped: bool) -> Tensor:
    """A parameter as ``[O, I]`` or, for a stack of experts, ``[E, O, I]``: a view, so writing to it writes to the parameter.

    ``kind``: "linear", "experts" or "conv" (``[O, C / groups, *kernel]``, flattened to ``[O, C / groups * kernel]``).
    ``swapped`` parameters store ``[..., I, O]``.
    """
    if kind == "conv":
        return weight.flatten(1)
    return weight.mT if swapped else weight


def relative(name: str, scope: str) -> str:
    """``name`` as seen from the submodule ``scope`` ("" is the root). ValueError where it lies elsewhere."""
    if not scope:
        return name
    if not name.startswith(scope + "."):
        raise ValueError(f"{name} does not lie inside {scope}")
    return name[len(scope) + 1 :]


def absolute(name: str, scope: str) -> str:
    """``name``, which is one inside the submodule ``scope`` ("" is the root), as seen from the root; ``""`` is the submodule itself."""
    return f"{scope}.{name}" if scope and name else scope or name


@dataclass(frozen=True)
class Layer:
    """A weight that can be quantized: y = x W^T (+ b), proved by comparing the module's output with this product.

    ``kind``: "linear" (a module of its own; ``swapped`` if it stores ``[I, O]``), "conv", or "experts" (a parameter ``[E, O, I]``
    or ``[E, I, O]`` read one expert at a time; such a layer has no module, its name is the parameter's).
    ``group``: layers with the same number read one and the same tensor; numbers follow the order of the calls.
    """

    name: str
    parameter: str
    kind: str
    in_features: int
    out_features: int
    shape: tuple[int, ...]
    swapped: bool = False
    bias: str | None = None
    group: int = 0
    block: int | None = None
    is_head: bool = False  # outside all blocks, and its output leaves the model or its weight is an embedding table
    routes: bool = False  # its output is ranked (top-k, argmax): a router of experts
    feeds_logits: bool = False  # its output reaches a softmax without passing another weight: queries, keys, routers

    def matrix(self, model: nn.Module) -> Tensor:
        """The weight as ``[O, I]`` or ``[E, O, I]``: a view of the parameter (of a convolution ``[O, C / groups * kernel]``)."""
        return matrix_view(model.get_parameter(self.parameter), self.kind, self.swapped)

    def flat(self, model: nn.Module) -> Tensor:
        """The weight as one float32 matrix ``[O, I]``, detached; of a stack of experts all rows one after the other."""
        weight = self.matrix(model).detach().float()
        return weight.reshape(-1, weight.shape[-1])

    @torch.no_grad()
    def write(self, model: nn.Module, matrix: Tensor) -> None:
        """Copy ``matrix`` (the shape that `matrix` has) into the parameter, in the parameter's dtype."""
        target = self.matrix(model)
        if target.shape != matrix.shape:
            raise ValueError(f"{self.name}: matrix must be {tuple(target.shape)}, not {tuple(matrix.shape)}")
        target.copy_(matrix)

    def within(self, scope: str) -> Layer:
        """The same layer as seen from the submodule named ``scope``."""
        bias = None if self.bias is None else relative(self.bias, scope)
        return replace(self, name=relative(self.name, scope), parameter=relative(self.parameter, scope), bias=bias)


@dataclass(frozen=True)
class Block:
    """One of the repeated modules. ``chain``: which sequence of blocks (an encoder, a decoder, a stage); ``index``: place in it."""

    name: str
    chain: int
    index: int


@dataclass(frozen=True, eq=False)
class Producer:
    """Where a site's channels come from.

    Output rows of a weight and its bias; or, of ``kind`` "vector", an elementwise factor ``offset + parameter``
    (offset 1 for norms that store ``weight - 1``) and the bias added after it; for a shift, the vector is itself what is added.
    ``rows [C]``: the flat output channels (expert-major for stacks) that take part, e.g. only v's rows of a fused q, k, v.
    """

    name: str
    parameter: str
    kind: str  # "linear", "experts", "conv" or "vector"
    rows: Tensor
    outputs: int  # all output channels of the parameter, E * O
    bias: str | None = None
    offset: float = 0.0
    swapped: bool = False

    @property
    def is_vector(self) -> bool:
        return self.kind == "vector"


@dataclass(frozen=True, eq=False)
class Consumer:
    """A weight that reads the channels of a site, quantizable (``layer`` names it) or not (routers).

    ``channel_map [I]`` (stacks ``[E * I]``): which producer channel feeds each input column; -1 where none does.
    """

    name: str
    parameter: str
    kind: str  # "linear", "experts" or "conv"
    channel_map: Tensor
    layer: str | None = None
    swapped: bool = False
    groups: int = 1  # of a convolution
    bias: str | None = None  # None for a shift means: the module accepts a bias, one is created

    def expand(self, values: Tensor, fill: float = 1.0) -> Tensor:
        """One value a producer channel ``[C]`` -> one an input column ``[I]``; ``fill`` where the site feeds nothing."""
        index = self.channel_map.to(values.device)
        return torch.where(index >= 0, values[index.clamp(min=0)], torch.full_like(values[:1], fill))

    def reduce(self, values: Tensor, channels: int) -> Tensor:
        """One value an input column ``[I]`` -> their mean for each of ``channels`` producer channels."""
        index = self.channel_map.to(values.device)
        fed = index >= 0
        zero = values.new_zeros(channels)
        count = zero.index_add(0, index[fed], torch.ones_like(values[fed]))
        return zero.index_add(0, index[fed], values[fed]) / count.clamp(min=1)

    def peak(self, values: Tensor, channels: int) -> Tensor:
        """As `reduce`, but the largest of them; 0 where a channel feeds none. ``values`` must not be negative."""
        index = self.channel_map.to(values.device)
        fed = index >= 0
        return values.new_zeros(channels).scatter_reduce(0, index[fed], values[fed], "amax")


@dataclass(frozen=True, eq=False)
class Site:
    """A place where the model can be rewritten without changing its function: ``kind`` "scale" or "shift".

    For s > 0 with one entry a channel: producer / s, consumer columns * s. For a shift d: producer - d, consumer bias + W d.
    """

    kind: str
    producer: Producer
    consumers: tuple[Consumer, ...]

    @property
    def channels(self) -> int:
        return len(self.producer.rows)

    @property
    def channel_map(self) -> Tensor:
        """The map of the first consumer (all maps are equal, except where stacks of experts are among the consumers)."""
        return self.consumers[0].channel_map

    @property
    def expands(self) -> bool:
        """Whether a producer channel feeds several columns of one consumer, as under grouped-query attention."""
        return any(int(torch.bincount(c.channel_map[c.channel_map >= 0]).max()) > 1 for c in self.consumers)

    @property
    def scope(self) -> str:
        """The smallest module that holds all consumers ("" is the root): where the effect of a rewrite can be measured."""
        names = [c.name.split(".") for c in self.consumers]
        shared = names[0] if len(names) == 1 else []
        if len(names) > 1:
            for parts in zip(*names, strict=False):
                if len(set(parts)) > 1:
                    break
                shared.append(parts[0])
        return ".".join(shared)

    def __str__(self) -> str:
        return f"{self.kind}: {self.producer.name} -> {', '.join(c.name for c in self.consumers)} ({self.channels} channels)"


@dataclass(frozen=True)
class Weight:
    """A parameter and how it is stored: ``kind`` "linear", "experts", "conv", or "table" (channels last: embeddings, tokens, biases)."""

    parameter: str
    kind: str
    swapped: bool = False


@dataclass(frozen=True, eq=False)
class Residual:
    """A stream of width D into which modules only add and from which they only read through norms, so that it may be rotated.

    With Q orthogonal: what ``writers`` add becomes y Q, ``readers`` get columns W Q, after the factor of every norm between was moved into
    its readers (``norms``) and its bias rotated. ``centred``: some norm subtracts the mean over channels, so Q must fix the vector of
    ones (`fix_ones`). ``ties``: pairs of names of one tied parameter, which has to become two, since a norm's factor goes into one only.
    """

    width: int
    chain: int
    writers: tuple[Weight, ...]
    readers: tuple[Weight, ...]
    norms: tuple[Site, ...]
    centred: bool = False
    ties: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, eq=False)
class Structure:
    """What a module is made of; ``layers`` in the order of their first calls.

    ``unproved``: (layer, why no scale site feeds it) and (first block of a chain, why its stream may not be rotated).
    """

    layers: list[Layer]
    sites: list[Site] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    residuals: list[Residual] = field(default_factory=list)
    unproved: list[tuple[str, str]] = field(default_factory=list)

    @property
    def residual(self) -> Residual | None:
        """The only residual stream, or None. Models with several have them in ``residuals``."""
        return self.residuals[0] if len(self.residuals) == 1 else None

    @property
    def attention_logit_layers(self) -> frozenset[str]:
        """Layers whose output reaches a softmax directly: queries, keys (fused ones too) and routers."""
        return frozenset(layer.name for layer in self.layers if layer.feeds_logits)

    def layer(self, name: str) -> Layer:
        """The layer of that name. KeyError lists what there is."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(f"no layer {name!r}; there are {', '.join(one.name for one in self.layers)}")

    def groups(self, names: Collection[str] | None = None) -> list[list[str]]:
        """Names of layers that read one tensor, group by group in call order; only those in ``names``, and only layers that
        are modules (stacks of experts are not called as such)."""
        found: dict[int, list[str]] = {}
        for layer in self.layers:
            if layer.kind != "experts" and (names is None or layer.name in names):
                found.setdefault(layer.group, []).append(layer.name)
        return list(found.values())

    def sites_of(self, layer: str, kind: str = "scale") -> list[Site]:
        """The sites that feed a layer."""
        return [s for s in self.sites if s.kind == kind and any(c.layer == layer for c in s.consumers)]

    def summary(self) -> str:
        """One screen of text: counts, then each distinct site once (numbers in names replaced by ``*``)."""
        chains = {b.chain: sum(o.chain == b.chain for o in self.blocks) for b in self.blocks}
        lines = [
            f"{len(self.layers)} layers in {len({layer.group for layer in self.layers})} groups; blocks: "
            + (" + ".join(str(n) for n in chains.values()) or "none")
        ]
        lines += _counted([str(site) for site in self.sites])
        for stream in self.residuals:
            kind = "mean-free " if stream.centred else ""
            lines.append(
                f"rotation: {kind}stream of {stream.width}, {len(stream.writers)} writers, {len(stream.readers)} readers"
            )
        lines += _counted([f"unproved: {name}: {why}" for name, why in self.unproved])
        return "\n".join(lines)

    def prefixed(self, prefix: str) -> Structure:
        """The same structure as seen from a parent in which the module is called ``prefix``."""
        if not prefix:
            return self

        def full(name: str) -> str:
            return f"{prefix}.{name}" if name else prefix

        def maybe(name: str | None) -> str | None:
            return None if name is None else full(name)

        layers = [replace(x, name=full(x.name), parameter=full(x.parameter), bias=maybe(x.bias)) for x in self.layers]
        sites = [
            Site(
                s.kind,
                replace(
                    s.producer,
                    name=full(s.producer.name),
                    parameter=full(s.producer.parameter),
                    bias=maybe(s.producer.bias),
                ),
                tuple(
                    replace(c, name=full(c.name), parameter=full(c.parameter), layer=maybe(c.layer), bias=maybe(c.bias))
                    for c in s.consumers
                ),
            )
            for s in self.sites
        ]
        blocks = [replace(b, name=full(b.name)) for b in self.blocks]
        return Structure(layers, sites, blocks, [], [(full(n), why) for n, why in self.unproved])


def _counted(lines: list[str]) -> list[str]:
    """Equal lines once, with how often they came, after numbers in dotted names are replaced by ``*``."""
    counts: dict[str, int] = {}
    for line in lines:
        words = [".".join("*" if p.isdigit() else p for p in w.split(".")) if "." in w else w for w in line.split(" ")]
        counts[" ".join(words)] = counts.get(" ".join(words), 0) + 1
    return [f"{n} x {line}" for line, n in counts.items()]
