"""AWQ's scale search: per-input-channel scales that move weight error away from the inputs that are large.

Lin et al., AWQ: Activation-aware Weight Quantization, MLSys 2024, arXiv 2306.00978, sections 3.2 and 4.1.

For layers that read one tensor x, with s in R_{>0}^I folded into whatever produces x:

    x W^T = (x / s) (W diag(s))^T                                   the float function stays the same
    s = a^r / sqrt(max(a^r) min(a^r)),   a = mean |x|               eq. 5, r on a grid of 20 points in [0, 1)
    r* = argmin || f(x; Q(W diag(s)) / s) - f(x; W) ||^2            f: the smallest module that holds all the readers

All r are tried on a part of the tokens, the few best of them (and r = 0) on all, for 0.7 of the token runs. The paper's code tries all on all:
``screen=tokens`` does.
Cost: ``grid`` runs of f on ``screen`` tokens and four on ``tokens`` tokens for each site.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dither.formats import Int, Scheme, channel, group
from dither.graph import Consumer, Layer, Site
from dither.graph.fold import column_view
from dither.graph.structure import relative
from dither.models import empty
from dither.quant.parts import BlockView, Transform
from dither.quant.statistics import MEAN_ABS, ROWS
from dither.quant.transforms.fold import fold_scale, largest_weights, seen_by
from dither.quant.walker import run

FLOOR = 1e-4  # of s before it is centred, as in the paper's code
FINALISTS = 3  # exponents, beside 0, that are judged on all tokens


@dataclass(frozen=True)
class ScaleSearch(Transform):
    """AWQ's scale search at every proved site whose readers are to be quantized.

    ``grid``: number of exponents r = i / grid tried; r = 0 is no scaling, so a site never gets worse on the search data.
    ``grouped_query``: also search where the producer has fewer channels than the reader (v -> o under grouped-query
    attention); the paper's code leaves those sites alone. ``tokens``: how many calibration tokens a trial sees. ``stand_in``: (bits, group or
    None) of the grid that trials are rounded to where a layer is stored as something else, such as a codebook; None leaves such layers out.
    """

    grid: int = 20
    grouped_query: bool = False
    tokens: int = 1024
    screen: int = 512
    stand_in: tuple[int, int | None] | None = None
    needs: ClassVar[frozenset[str]] = frozenset({MEAN_ABS, ROWS})

    def __post_init__(self) -> None:
        if self.grid < 1:
            raise ValueError(f"grid must be at least 1, not {self.grid}")
        if self.tokens < 1 or self.screen < 1:
            raise ValueError(f"tokens and screen must be at least 1, not {self.tokens} and {self.screen}")

    def captures(self, block: BlockView) -> Collection[str]:
        return {scope(readers) for _, readers in self._candidates(block)}

    def _candidates(self, block: BlockView) -> Iterator[tuple[Site, list[Consumer]]]:
        """Sites to search, each with the readers that trials have a grid for."""
        grids = self._grids(block)
        for site in block.structure.sites:
            readers = [c for c in site.consumers if c.layer in grids]
            if site.kind == "scale" and readers and (self.grouped_query or not site.expands):
                yield site, readers

    def _grids(self, block: BlockView) -> dict[str, Scheme]:
        """What a trial rounds each layer to."""
        other = None
        if self.stand_in is not None:
            bits, size = self.stand_in
            other = Int(bits) @ (channel() if size is None else group(size))
        chosen = {name: scheme if isinstance(scheme, Scheme) else other for name, scheme in block.schemes.items()}
        return {name: scheme for name, scheme in chosen.items() if scheme is not None}

    def apply(self, block: BlockView) -> None:
        """Search every site on the unscaled block, then fold all of them (the order of the paper's code)."""
        chosen: list[tuple[Site, Tensor]] = []
        for site, readers in self._candidates(block):
            if not any(c.layer in block.statistics or c.layer in block.slices for c in readers):
                continue  # no calibration data got there
            scale, finding = self.search(block, site, readers)
            block.findings.append(finding)
            if finding["r"] > 0:
                chosen.append((site, scale))
        for site, scale in chosen:
            fold_scale(block, site, scale)

    @torch.no_grad()
    def search(self, block: BlockView, site: Site, readers: list[Consumer]) -> tuple[Tensor, dict[str, Any]]:
        """The best scale ``[C]`` (one a producer channel) and what the search saw. FloatingPointError where no loss is finite."""
        importance = self._importance(block, site, readers)
        trial = _Trial(block, readers, self._grids(block))
        scales = [candidate(importance, i / self.grid) for i in range(self.grid)]
        judged = list(range(self.grid))
        few = trial.part(self.screen)
        if few < trial.size:
            guesses = [trial.loss(scale, few) for scale in scales]
            finite = [i for i in judged if guesses[i] < math.inf]
            judged = sorted({0, *sorted(finite, key=lambda i: guesses[i])[:FINALISTS]})
        losses = {i: trial.loss(scales[i]) for i in judged}
        plain, best_loss, chosen = losses[0], math.inf, 0
        for i, loss in losses.items():
            if loss < best_loss:
                best_loss, chosen = loss, i
        best = scales[chosen]
        empty(trial.module)
        if not best_loss < math.inf:
            raise FloatingPointError(f"{block.name}: no exponent gives a finite loss at the site {site}")
        return best, {
            "site": f"{block.name}: {site.producer.name} -> {', '.join(c.name for c in site.consumers)}",
            "r": chosen / self.grid,
            "loss": best_loss,
            "loss_at_r0": plain,
            "scale_min": float(best.min()),
            "scale_max": float(best.max()),
        }

    @staticmethod
    def _importance(block: BlockView, site: Site, readers: Sequence[Consumer]) -> Tensor:
        """``a [C]``: mean |x| of each producer channel, averaged over the reader columns it feeds (the GQA map); 0 where the
        channel is never active or its weights are all zero, so that its scale stays 1."""
        for reader in readers:
            if (a := seen_by(block, reader, lambda s: s.mean_abs, lambda columns: columns.mean(1))) is not None:
                break
        assert a is not None
        live = largest_weights(block, site, readers) > 0
        return torch.where(live, reader.reduce(a, site.channels), torch.zeros(site.channels))


def candidate(importance: Tensor, r: float) -> Tensor:
    """``s = a^r / sqrt(max min)``, with s = 1 for channels without activity, which also do not count for the centre."""
    active = importance > 0
    out = torch.ones_like(importance)
    if r == 0 or not bool(active.any()):
        return out
    s = importance[active].pow(r).clamp(min=FLOOR)
    out[active] = s / (s.max() * s.min()).sqrt()
    return out


def scope(readers: Sequence[Consumer]) -> str:
    """The name of f: the smallest module that holds all readers ("" is the block); a single layer is its own."""
    names = [c.name if c.kind != "experts" else c.name.rpartition(".")[0] for c in readers]
    shared = []
    for parts in zip(*(n.split(".") for n in names), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


class _Trial:
    """The module f on its stored inputs, in the compute type, with the readers' weights exchanged for trial ones."""

    def __init__(self, block: BlockView, readers: Sequence[Consumer], grids: Mapping[str, Scheme]) -> None:
        name = scope(readers)
        self.module = copy.deepcopy(block.module.get_submodule(name)).to(block.compute)
        self.calls = block.search_calls[name]
        self.readers = readers
        layers: list[Layer] = [block.structure.layer(c.layer or "") for c in readers]
        self.weights = [column_view(block.module.get_parameter(c.parameter), c).detach().clone() for c in readers]  # [S, O, I, k]
        self.places = [column_view(self.module.get_parameter(relative(c.parameter, name)), c).detach() for c in readers]
        self.schemes: list[Any] = [grids.get(layer.name, block.schemes[layer.name]) for layer in layers]
        self.size = len(self.calls)
        self.reference = self._rows(self.size)

    def part(self, tokens: int) -> int:
        """How many of the stored calls hold at least so many tokens."""
        total = 0
        for count, call in enumerate(self.calls, 1):
            total += call.tokens
            if total >= tokens:
                return count
        return self.size

    def loss(self, scale: Tensor, calls: int | None = None) -> float:
        """``mean (f(x; Q(W s) / s) - f(x; W))^2`` over the tokens of the first ``calls`` calls (None: of all); ``scale [C]``."""
        for reader, place, weight, scheme in zip(self.readers, self.places, self.weights, self.schemes, strict=True):
            slices, outputs, columns, _ = weight.shape
            s = reader.expand(scale).view(slices, 1, columns, 1)
            rounded = scheme.quantize((weight * s).reshape(slices * outputs, -1))
            place.copy_(rounded.view(weight.shape).div_(s))
        total, count = 0.0, 0
        for rows, reference in zip(self._rows(self.size if calls is None else calls), self.reference, strict=False):
            total += float(rows.sub_(reference).square_().sum())
            count += rows.numel()
        return total / max(count, 1)

    def _rows(self, calls: int) -> list[Tensor]:
        """f's outputs on the first calls as float32 rows, padding left out."""
        found = []
        some = self.calls[:calls]
        for call, out in zip(some, run(self.module, some), strict=True):
            masked = call.mask is not None and out.shape[: call.mask.dim()] == call.mask.shape
            found.append((out[call.mask] if masked else out).float())
        return found
