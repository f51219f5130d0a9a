"""Grids: how the scale and zero point of each block are chosen before (or apart from) rounding.

A clipped weight rounded on its min-max grid is the plain weight rounded on the clipped grid; so clipping searches return grids and leave
the weights alone. A rounding that pushes errors around (GPTQ) then still aims at the true weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dither.formats import Clip, Params, Scheme, clip_search
from dither.formats.quantiles import quantile_search
from dither.quant.parts import Grid
from dither.quant.statistics import ROWS, Statistics, gram_blocks


@dataclass(frozen=True)
class MinMax(Grid):
    """The grid spans each block's smallest to largest weight (or what the scheme's own `Clip` finds)."""

    def fit(self, weight: Tensor, scheme: Scheme, statistics: Statistics | None) -> Params:
        return scheme.fit(weight)


@dataclass(frozen=True)
class PowerClip(Grid):
    """Each block's range shrinks to where ``sum |w_hat - w|^p`` is least (GPTQ's ``mse``, p = 2.4)."""

    p: float = 2.4
    grid: int = 100
    shrink: float = 0.8

    def fit(self, weight: Tensor, scheme: Scheme, statistics: Statistics | None) -> Params:
        return scheme.fit(weight, clip=self.search)

    @property
    def search(self) -> Clip:
        return Clip(p=self.p, grid=self.grid, shrink=self.shrink)


@dataclass(frozen=True)
class QuantileGrid(Grid):
    """Each block's grid spans the quantiles of its weights that give the least squared error, of those for p in {0.999, 0.9999, 0.99999}
    (`formats.quantiles`; RepQ, arXiv 2212.08254).

    A range that does not contain 0 is widened to it where the format needs it: a stored whole zero point lies among the codes.
    ``Int(b, zero="float")`` spans the range itself.
    """

    def fit(self, weight: Tensor, scheme: Scheme, statistics: Statistics | None) -> Params:
        shared = scheme.format.shared(weight)
        shape = scheme.blocks.grid_shape(*weight.shape)
        found: Params = dict(shared)
        for piece in scheme.blocks.pieces(*weight.shape):
            blocks = piece.blocked(weight)
            params = quantile_search(blocks, scheme.format, shared=shared) if blocks.shape[-1] else scheme.format.fit(blocks, shared)
            for key, value in params.items():
                if value.dim():
                    found.setdefault(key, value.new_zeros(shape))[piece.grid_rows, piece.grid_columns] = value
        return found


@dataclass(frozen=True)
class OutputClip(Grid):
    """AWQ's clipping search: each (row, group) shrinks to where its *output* error ``mean_t ((w_hat - w) . x_t)^2`` is least.

    Written as ``d^T G d`` with the group's Gram matrix ``G = mean x x^T``: equal, and no token is touched again. ``grid`` and
    ``shrink`` are the paper's code: 20 steps, of which the first half is tried. ``mode="absolute"`` is the paper's code too: weights are clamped
    to +-c, c = max |w| (1 - i / 20). The default shrinks both ends of the range alike, which left less output error on smollm2
    where weights were rounded to nearest. ``spare_attention``: layers
    that feed the attention logits (q and k) keep their full range, since softmax turns their largest products into decisions.
    ``guard``: search on every other kept input, and keep the full range of a layer whose output error on the rest does not fall.
    """

    grid: int = 20
    shrink: float = 0.5
    mode: str = "1d"
    spare_attention: bool = True
    guard: bool = False
    needs: ClassVar[frozenset[str]] = frozenset({ROWS})

    def fit(self, weight: Tensor, scheme: Scheme, statistics: Statistics | None) -> Params:
        clip = Clip(p=2, grid=self.grid, shrink=self.shrink, mode=self.mode)
        if statistics is None or statistics.tokens == 0:
            return scheme.fit(weight)
        size = scheme.blocks.columns(weight.shape[1])
        if self.guard:
            seen, unseen = statistics.rows[::2], statistics.rows[1::2]
            clipped = scheme.fit(weight, gram=gram_blocks(seen, size), weight=seen.square().mean(0), clip=clip)
            full = scheme.fit(weight)
            kept = min(full, clipped, key=lambda p: float((unseen @ (scheme.quantize(weight, p) - weight).T).square().sum()))
            return kept
        gram = statistics.derived(("gram", size), lambda: statistics.gram_blocks(size))  # layers that read one tensor share it
        return scheme.fit(weight, gram=gram, weight=statistics.power(), clip=clip)


__all__ = ["MinMax", "OutputClip", "PowerClip", "clip_search", "torch"]
