"""The last word on every site: fold random values into the weights, and look whether any output moved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dither.graph.exact import (
    Call,
    bench_copy,
    exact_calls,
    float64_default,
    randomize,
    relative_difference,
    run_exactly,
    untie,
)
from dither.graph.fold import apply_scale, apply_shift
from dither.graph.structure import Site, Structure

EXACT = 1e-9  # relative difference of outputs up to which a rewrite counts as leaving the function unchanged


def verified(
    structure: Structure, block: nn.Module, calls: Sequence[tuple[Sequence[Any], Mapping[str, Any]]], *, seed: int = 0
) -> Structure:
    """The same structure with only those sites that hold on ``block`` too (another block of the same shape)."""
    with float64_default():
        bench = bench_copy(block)
        untie(bench)
        generator = torch.Generator().manual_seed(seed)
        sites, failed = verify(bench, exact_calls([(tuple(a), dict(k)) for a, k in calls]), structure.sites, generator)
    lost = [
        (c.layer, why) for site, why in failed for c in site.consumers if c.layer is not None and site.kind == "scale"
    ]
    return replace(structure, sites=sites, unproved=[*structure.unproved, *lost])


def verify(
    module: nn.Module, calls: list[Call], sites: Sequence[Site], generator: torch.Generator
) -> tuple[list[Site], list[tuple[Site, str]]]:
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
