"""Scaling keys against queries: factors that cancel in q k^T. (S_qk of OSTQuant, arXiv 2501.13987.)

With one S > 0 for each channel c of a key head g, and h a query head that reads g (h = g, or several under grouped-query attention):

    W_k[g, c] <- W_k[g, c] S_gc,    b_k likewise        W_q[h, c] <- W_q[h, c] / S_gc,    b_q likewise

A rotary embedding between the projection and the product turns channels in pairs, so S commutes with it only where both channels of a pair share
one value. Which do, if any, is a property of the code: tried are, from the most freedom to the least, all channels free, pairs (j, j + r/2)
and pairs (2j, 2j + 1) among the first r channels of a head, r = d, d/2, d/4. The first that leaves all outputs unchanged to 1e-9, in float64 on
random weights, is taken. A norm between the projection and the product lets none of them pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from dither.graph.structure import Layer, Structure, matrix_view
from dither.graph.tree import tensors_of
from dither.graph.trial import Trial, trial


@dataclass(frozen=True, eq=False)
class KeyScaling:
    """``heads`` (G) heads of ``size`` (d) rows of the layer ``keys``; ``queries`` has as many or a multiple, in runs that read one key head.
    ``shared [d]``: which of a head's n free values each of its channels takes."""

    keys: Layer
    queries: Layer
    size: int
    heads: int
    shared: Tensor

    @property
    def values(self) -> int:
        """G n: how many factors there are to choose."""
        return self.heads * (int(self.shared.max()) + 1)

    def of_keys(self, s: Tensor) -> Tensor:
        """``s [G n]`` -> ``[G d]``, what each row of the keys is multiplied with."""
        return s.view(self.heads, -1)[:, self.shared.to(s.device)].flatten()

    def of_queries(self, s: Tensor) -> Tensor:
        """``s [G n]`` -> what each row of the queries is multiplied with."""
        runs = self.queries.out_features // self.keys.out_features
        return (1 / self.of_keys(s)).view(self.heads, 1, self.size).expand(-1, runs, -1).flatten()

    def __str__(self) -> str:
        free = self.values // self.heads
        return f"scale: {self.keys.name} <-> {self.queries.name} ({self.heads} heads of {self.size}, {free} values each)"


@torch.no_grad()
def apply_key_scaling(module: nn.Module, scaling: KeyScaling, s: Tensor) -> None:
    """Scale by ``s [G n]`` in place, computed in float64; the module's function stays the same. ValueError for another shape or s <= 0."""
    if s.shape != (scaling.values,):
        raise ValueError(f"s must be [{scaling.values}], not {list(s.shape)}")
    if not bool(((s > 0) & s.isfinite()).all()):
        raise ValueError("s must be positive and finite")
    for layer, factors in ((scaling.keys, scaling.of_keys(s.double())), (scaling.queries, scaling.of_queries(s.double()))):
        matrix = matrix_view(module.get_parameter(layer.parameter), layer.kind, layer.swapped)
        matrix.copy_(matrix.double() * factors.to(matrix.device).view(-1, 1))
        if layer.bias is not None:
            bias = module.get_parameter(layer.bias)
            bias.copy_(bias.double() * factors.to(bias.device))


def find_key_scalings(
    module: nn.Module,
    calls: Sequence[tuple[Sequence[Any], Mapping[str, Any]]],
    structure: Structure,
    sizes: Sequence[int],
    *,
    seed: int = 0,
) -> list[KeyScaling]:
    """Of a block: the pairs of linear layers whose outputs may be scaled against each other.

    ``structure``: as `discover_block` gives it. ``sizes``: of heads, to try (those of values). ``calls``: some of the block's calls; those on single
    tokens prove nothing, since no embedding of positions shows in them. The module is not changed.
    """
    several = [(a, k) for a, k in calls if any(t.dim() > 2 and t.shape[-2] > 1 for t in tensors_of(a) if t.is_floating_point())]
    pairs = list(_candidates(structure))
    if not several or not pairs or not sizes:
        return []
    with trial(module, several, seed) as bench:
        return [one for pair in pairs if (one := _freest(bench, *pair, sizes)) is not None]


def _candidates(structure: Structure) -> Iterator[tuple[Layer, Layer]]:
    """(keys, queries): what reaches a softmax from one attention module. The narrower one, else the later one, holds the keys."""
    found = [x for x in structure.layers if x.feeds_logits and not x.routes and x.kind == "linear"]
    for first, second in combinations(found, 2):
        if first.name.rpartition(".")[0] == second.name.rpartition(".")[0]:
            keys, queries = (first, second) if first.out_features < second.out_features else (second, first)
            if queries.out_features % keys.out_features == 0:
                yield keys, queries


def _sharings(size: int) -> Iterator[Tensor]:
    """Which channels of a head share a value, from the most freedom to the least."""
    yield torch.arange(size)
    for apart in (True, False):
        for turned in (size, size // 2, size // 4):
            if turned < 2 or turned % 2:
                continue
            half = torch.arange(turned // 2)
            pairs = torch.cat([half, half]) if apart else half.repeat_interleave(2)
            yield torch.cat([pairs, turned // 2 + torch.arange(size - turned)])


def _freest(bench: Trial, keys: Layer, queries: Layer, sizes: Sequence[int]) -> KeyScaling | None:
    for size in sizes:
        if keys.out_features % size == 0:
            for shared in _sharings(size):
                one = KeyScaling(keys, queries, size, keys.out_features // size, shared)
                if _holds(bench, one):
                    return one
    return None


def _holds(bench: Trial, one: KeyScaling) -> bool:
    """Whether random factors leave every output as it was."""
    s = torch.exp(torch.randn(one.values, generator=bench.generator, dtype=torch.float64))
    apply_key_scaling(bench.bench, one, s)
    holds = bench.unchanged()
    apply_key_scaling(bench.bench, one, 1 / s)
    return holds
