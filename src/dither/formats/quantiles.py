"""Ranges from quantiles: cut off the few largest values where that makes the error of all values smaller.

For each p in {0.999, 0.9999, 0.99999}:  hi = quantile(x, p),  lo = quantile(x, 1 - p);  the grid on [lo, hi] with the least mean squared error of x
wins (the calibration of RepQ's code, arXiv 2212.08254, and of many that build on it). Quantiles interpolate linearly between order statistics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dither.formats.format import Format, Params

PROBABILITIES = (0.999, 0.9999, 0.99999)
Make = Callable[[Tensor, Tensor], Params]


def upper_quantiles(x: Tensor, probabilities: Sequence[float]) -> list[Tensor]:
    """``x (..., n)`` -> the quantiles ``(...)`` for each p in (0, 1]: as torch.quantile, but for any n. ValueError for other p, and for n = 0."""
    n = x.shape[-1]
    if n == 0:
        raise ValueError("quantiles: of no values")
    if not all(0 < p <= 1 for p in probabilities):
        raise ValueError(f"quantiles: probabilities must be in (0, 1], not {list(probabilities)}")
    places = [p * (n - 1) for p in probabilities]
    top = x.topk(n - math.floor(min(places)), -1).values  # falling: top[k] is the order statistic n - 1 - k
    found = []
    for place in places:
        below = math.floor(place)
        above = min(below + 1, n - 1)
        found.append(torch.lerp(top[..., n - 1 - below], top[..., n - 1 - above], place - below))
    return found


def quantile_ranges(x: Tensor, probabilities: Sequence[float] = PROBABILITIES) -> list[tuple[Tensor, Tensor]]:
    """``x (..., n)`` -> ``(quantile(1 - p), quantile(p))``, each ``(...)``, for each p."""
    return [(-lo, hi) for lo, hi in zip(upper_quantiles(-x, probabilities), upper_quantiles(x, probabilities), strict=True)]


def quantile_search(
    x: Tensor, fmt: Format, make: Make | None = None, probabilities: Sequence[float] = PROBABILITIES, shared: Params | None = None
) -> Params:
    """The best grid of each block of ``x (..., n)``. ``make(lo, hi)``: the grid on a range; by default the format's own, on the range widened to
    what its grid must contain. Of equal ones the first wins."""

    def own(lo: Tensor, hi: Tensor) -> Params:
        return fmt.fit(torch.stack([lo, hi], -1), shared)

    best: Params = {}
    least = x.new_full(x.shape[:-1], math.inf)
    for lo, hi in quantile_ranges(x, probabilities):
        params = (make or own)(lo, hi)
        loss = (fmt.quantize(x, params) - x).square_().mean(-1)
        better = loss < least
        least = torch.where(better, loss, least)
        for key, value in params.items():
            best[key] = torch.where(better, value, best.get(key, value)) if value.dim() else value
    return best


def free_affine(bits: int) -> Make:
    """Grids of `Int` that span exactly ``[lo, hi]``, which need not contain 0:  s = (hi - lo) / N,  z = round(-lo / s), N = 2^bits - 1.

    z is a whole number of any size: values in [5, 6] at 4 bits have s = 1/15 and z = -75. For parameters that are kept as floats (those of
    inputs); a stored zero point of `Int` has only ``bits`` bits. A range of one value gets the grid that has it.
    """
    top = (1 << bits) - 1

    def make(lo: Tensor, hi: Tensor) -> Params:
        scale = (hi - lo) / top
        alone = lo.abs() / top
        scale = torch.where(scale > 0, scale, torch.where(alone > 0, alone, torch.ones_like(scale)))
        return {"scale": scale, "zero_point": (-lo / scale).round()}

    return make
