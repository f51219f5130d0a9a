"""`discover` and `discover_block`: run, probe, verify, and write down what was found.

Everything happens in float64 on a copy with random weights (`exact`). One watched run shows who reads what (`trace`); two tests show
which channels reach which readers in proportion (`covariance`) and by what map (`channel_map`); what they let through is folded into the
weights and must leave every output unchanged (`verify`). Residual streams are proved apart (`residual`).

Cost: some 20 runs of the module on the sample; 0.2 s on one core for a decoder block 576 wide with 32 tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from dither.graph.bench import Bench
from dither.graph.blocks import find_chains
from dither.graph.channel_map import map_channels
from dither.graph.covariance import candidates
from dither.graph.exact import Call, as_call, bench_copy, exact_calls, float64_default, randomize, untie
from dither.graph.layers import affine_modules, read_layers
from dither.graph.residual import NotProved, find_residual
from dither.graph.sites import allowed, can_shift, reasons, record, storage, unread_siblings
from dither.graph.structure import Block, Layer, Site, Structure, Weight
from dither.graph.verify import verify


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
                residuals.append(
                    find_residual(bench, calls, c, chain, found.norms, ties, found.layouts, found.unread, seed)
                )
            except NotProved as reason:
                refused.append((chain[0], f"its stream cannot be rotated: {reason}"))
    layers = [_placed(layer, blocks, found.leaving) for layer in found.structure.layers]
    return replace(
        found.structure,
        layers=layers,
        blocks=blocks,
        residuals=residuals,
        unproved=[*found.structure.unproved, *refused],
    )


def _placed(layer: Layer, blocks: Sequence[Block], leaving: Collection[str]) -> Layer:
    """The layer with its block; outside all blocks, what leaves the model is the head."""
    block = next((i for i, b in enumerate(blocks) if layer.name.startswith(b.name + ".")), None)
    return replace(layer, block=block, is_head=layer.is_head or (block is None and layer.parameter in leaving))


def discover_block(
    block: nn.Module, calls: Sequence[tuple[Sequence[Any], Mapping[str, Any]]], *, name_prefix: str = "", seed: int = 0
) -> Structure:
    """Layers, groups and sites inside one block, given some of its calls ``(args, kwargs)``; ``block`` is not changed.

    A few dozen tokens suffice; at least two are needed. ``name_prefix`` is put before all names. ValueError where ``calls`` is empty.
    """
    if not calls:
        raise ValueError("calls must hold at least one call of the block")
    with float64_default():
        bench = bench_copy(block)
        ties = untie(bench)
        randomize(bench, torch.Generator().manual_seed(seed))
        return _Examined.of(
            bench, exact_calls([(tuple(a), dict(k)) for a, k in calls]), (), ties, seed
        ).structure.prefixed(name_prefix)


@dataclass(frozen=True, eq=False)
class _Examined:
    """What `discover_block` finds, and what the search for residual streams needs besides."""

    structure: Structure
    norms: list[Site]  # scale sites of vectors, those on tied parameters too
    layouts: dict[str, Weight]
    unread: dict[str, str]
    leaving: set[str]

    @classmethod
    def of(
        cls, module: nn.Module, calls: list[Call], cuts: Sequence[str], ties: tuple[tuple[str, str], ...], seed: int
    ) -> _Examined:
        """Examine a bench copy, whose weights are overwritten; stretches also end at the outputs of the modules ``cuts``."""
        bench = Bench(module, calls, [module.get_submodule(n) for n in cuts], seed)
        affine = affine_modules(module, calls)
        reaching = candidates(bench)
        found, failed = map_channels(bench, reaching)
        layers = read_layers(module, bench, affine, ties)
        unread = unread_siblings(module, bench, cuts)
        records = [
            (one, record(module, bench, one, layers))
            for one in found
            if one.source.kind == "scale" or can_shift(module, bench, one, affine)
        ]
        sites, dropped = allowed(bench, records, ties, unread)
        sites, unverified = verify(module, calls, sites, bench.generator)
        dropped |= {c.parameter: why for site, why in unverified for c in site.consumers if site.kind == "scale"}
        structure = Structure(layers, sites, unproved=reasons(layers, sites, bench, reaching, failed, dropped))
        layouts = {n: Weight(n, storage(module, n), m.view.swapped) for n, m in bench.matrices.items()}
        return cls(
            structure,
            [s for _, s in records if s.kind == "scale" and s.producer.is_vector],
            layouts,
            unread,
            bench.leaving,
        )
