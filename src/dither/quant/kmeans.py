"""Weighted k-means (Lloyd, IEEE Trans. Inf. Theory 1982): centroids of vectors, some of which matter more than others.

    minimise  J = sum_i w_i |x_i - C_{a_i}|^2:    a_i = argmin_c |x_i - C_c|^2,    C_c = sum_{a_i = c} w_i x_i / sum_{a_i = c} w_i

J never rises. A centroid without weight stays where it is. Everything drawn is drawn from the seed, and sums are taken in one order, so results do
not depend on threads. Time an iteration: n k v multiply-adds (`kernels.nearest_centroids`); memory: 8 n (v + 2) bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dither import kernels

INITS = ("random", "spread")
SAMPLE = 1 << 15  # vectors that spread centroids are drawn from


@dataclass(frozen=True)
class Clusters:
    """``centroids [k, v]`` in the vectors' type, the objective ``J`` before each update, and how many centroids no vector has."""

    centroids: Tensor
    losses: list[float]
    empty: int


def weighted_kmeans(
    x: Tensor, weight: Tensor | None, k: int, *, iterations: int = 100, tolerance: float = 1e-5, init: str = "random", seed: int = 0
) -> Clusters:
    """``x [n, v]`` float32 or float64, ``weight [n]`` >= 0 (None: all the same) -> k centroids.

    Stops after ``iterations`` updates, or once J falls by less than ``tolerance`` of itself. ``init``: "random" starts from k of the vectors that
    have weight; "spread" draws them one by one, with a probability that grows with w times the squared distance to those drawn (k-means++, Arthur
    and Vassilvitskii 2007; from a sample of 32768). With no more than k distinct vectors they are the centroids, and the last is repeated.

    Raises ValueError for shapes and values that make no sense.
    """
    if x.dim() != 2 or not len(x):
        raise ValueError(f"x: must be vectors [n, v], not {list(x.shape)}")
    if weight is not None and (weight.shape != (len(x),) or not bool((weight >= 0).all())):
        raise ValueError(f"weight: must be {len(x)} numbers that are not negative, not {list(weight.shape)}")
    if k < 1 or iterations < 0:
        raise ValueError(f"k, iterations: must be positive, not {k}, {iterations}")
    if init not in INITS:
        raise ValueError(f"init: must be one of {', '.join(INITS)}, not {init!r}")
    x = x.contiguous()
    w = torch.ones(len(x), dtype=torch.float64) if weight is None else weight.double()
    if not bool((w > 0).any()):
        w = torch.ones_like(w)
    few = _few_distinct(x, k)
    if few is not None:
        return Clusters(torch.cat([few, few[-1:].expand(k - len(few), -1)]).contiguous(), [0.0], k - len(few))

    g = torch.Generator().manual_seed(seed)
    centroids = _random(x, w, k, g) if init == "random" else _spread(x, w, k, g)
    columns = [w, *((w * x[:, i]) for i in range(x.shape[1]))]  # weights, then weighted vectors, each [n]
    power = float(w @ x.double().square().sum(1))
    losses: list[float] = []
    filled = torch.zeros(k, dtype=torch.bool)
    for step in range(iterations + 1):
        a = kernels.nearest_centroids(x, centroids).long()
        sums = torch.stack([torch.bincount(a, c, minlength=k) for c in columns])  # (1 + v, k)
        c = centroids.double()
        filled = sums[0] > 0
        # sum w |x - C|^2 = sum w |x|^2 - 2 sum_c C_c S_c + sum_c W_c |C_c|^2
        losses.append(max(0.0, power + float((sums[0] * c.square().sum(1)).sum() - 2 * (c.T * sums[1:]).sum())))
        settled = len(losses) > 1 and losses[-2] - losses[-1] <= tolerance * losses[-2]
        if step == iterations or settled:
            break
        centroids = torch.where(filled[:, None], (sums[1:] / sums[0].clamp(min=1e-300)).T, c).to(x.dtype).contiguous()
    return Clusters(centroids, losses, int((~filled).sum()))


def _few_distinct(x: Tensor, k: int) -> Tensor | None:
    """The distinct vectors, where there are no more than k."""
    line = x.double() @ torch.linspace(1, 2, x.shape[1], dtype=torch.float64).exp()  # equal vectors have equal places on it
    if len(torch.unique(line)) > k:
        return None
    found = torch.unique(x, dim=0)
    return found if len(found) <= k else None


def _random(x: Tensor, w: Tensor, k: int, g: torch.Generator) -> Tensor:
    live = (w > 0).nonzero()[:, 0]
    if len(live) >= k:
        return x[live[torch.randperm(len(live), generator=g)[:k]]].contiguous()
    return x[torch.randint(len(x), (k,), generator=g)].contiguous()


def _spread(x: Tensor, w: Tensor, k: int, g: torch.Generator) -> Tensor:
    if len(x) > SAMPLE:
        chosen = torch.randperm(len(x), generator=g)[:SAMPLE]
        x, w = x[chosen], w[chosen]
    found = torch.empty(k, x.shape[1], dtype=x.dtype)
    distance = torch.full_like(w, torch.inf)
    chance = w
    draws = torch.rand(k, dtype=torch.float64, generator=g)
    for c in range(k):
        total = chance.cumsum(0)
        at = int(torch.searchsorted(total, draws[c] * total[-1])) if float(total[-1]) > 0 else int(draws[c] * len(x))
        found[c] = x[min(at, len(x) - 1)]
        distance = torch.minimum(distance, (x - found[c]).double().square().sum(1))
        chance = w * distance
    return found
