"""SmoothQuant: moves the outliers of activations into weights, channel by channel, so that both are easy to round.

Xiao, Lin, Seznec, Wu, Demouth, Han: SmoothQuant, ICML 2023, arXiv 2211.10438, section 4. At a site whose readers read X,

    Y = (X diag(s)^-1) (diag(s) W^T)             s folded into what produces X
    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)  eq. 4; max|W_j| over all readers

At alpha = 0.5 the largest entry of input channel j and of weight column j are equal afterwards: sqrt(max|X_j| max|W_j|).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dither.graph import Site
from dither.quant.parts import BlockView, Transform
from dither.quant.statistics import MAX_ABS
from dither.quant.transforms.fold import fold_scale, largest_weights, seen_by

FLOOR = 1e-5  # of max|W_j| and of s, as in the paper's code


@dataclass(frozen=True)
class Smooth(Transform):
    """``alpha``: how much of the difficulty goes to the weights, 0 to 1. ``everywhere``: also where a weight produces the channels (v -> o,
    up -> down); the paper's code takes norms only. ``grouped_query``: also where one producer channel feeds several columns."""

    alpha: float = 0.5
    everywhere: bool = False
    grouped_query: bool = False
    needs: ClassVar[frozenset[str]] = frozenset({MAX_ABS})

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be within 0 .. 1, not {self.alpha}")

    def captures(self, block: BlockView) -> Collection[str]:
        return ()

    def apply(self, block: BlockView) -> None:
        chosen = []
        for site in block.structure.sites:
            if site.kind != "scale" or not (self.everywhere or site.producer.is_vector) or (site.expands and not self.grouped_query):
                continue
            if (scale := self.scale_of(block, site)) is not None:
                chosen.append((site, scale))
        for site, scale in chosen:
            fold_scale(block, site, scale)
            block.findings.append(
                {
                    "site": f"{block.name}: {site.producer.name} -> {', '.join(c.name for c in site.consumers)}",
                    "alpha": self.alpha,
                    "scale_min": float(scale.min()),
                    "scale_max": float(scale.max()),
                }
            )

    def scale_of(self, block: BlockView, site: Site) -> Tensor | None:
        """``s [C]`` (eq. 4), 1 for channels that are never active or that nothing reads; None where no layer to be quantized was seen."""
        readers = [c for c in site.consumers if c.layer in block.schemes]
        largest = torch.zeros(site.channels)
        seen = False
        for reader in readers:
            found = seen_by(block, reader, lambda s: s.max_abs, lambda columns: columns.amax(1))
            if found is not None:
                seen = True
                largest = torch.maximum(largest, reader.peak(found, site.channels))
        if not seen:
            return None
        weights = largest_weights(block, site, readers)
        live = (largest > 0) & (weights > 0)
        scale = largest.pow(self.alpha) / weights.clamp(min=FLOOR).pow(1 - self.alpha)
        return torch.where(live, scale.clamp(min=FLOOR), torch.ones_like(scale))
