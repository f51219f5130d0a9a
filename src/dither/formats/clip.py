"""Clipping search: shrink a block's range where the finer steps gain more than the clipped ends lose.

For candidates p_i = 1 - i / grid, i = 0 .. int(shrink grid) - 1, both ends of the range shrink to p_i of themselves and the grid is made
anew; the first strictly best candidate of each block wins, so the result is never worse than min-max in the searched norm:

    sum |w_hat - w|^p                 p = 2.4 (GPTQ's code, BRECQ, LAPQ)
    sum_j weight_j (w_hat - w)_j^2    weighted by input
    d^T G d,  d = w_hat - w           weighted by the group's Gram matrix (AWQ's clipping, through the output)

``mode="absolute"``: values are clamped to +-p_i max |w| (AWQ's code), so that of a skewed block only the longer end shrinks at first.
``mode="2d"`` (asymmetric integers): range width and zero point are searched on their own: R_i = R i / grid and every zero point.
Time: candidates x O I (x n with a Gram matrix); memory: a few copies of the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dither.formats.format import Format, Params, as_like
from dither.formats.integer import Int


@dataclass(frozen=True)
class Clip:
    """Knobs of the search; the defaults are those of GPTQ's code. Raises ValueError for values out of range."""

    p: float = 2.4
    grid: int = 100
    shrink: float = 0.8
    mode: str = "1d"

    def __post_init__(self) -> None:
        if not self.p > 0:
            raise ValueError(f"p must be positive, not {self.p}")
        if self.grid < 1:
            raise ValueError(f"grid must be at least 1, not {self.grid}")
        if not 0 < self.shrink <= 1:
            raise ValueError(f"shrink must be in (0, 1], not {self.shrink}")
        if self.mode not in ("1d", "absolute", "2d"):
            raise ValueError(f"mode must be '1d', 'absolute' or '2d', not {self.mode!r}")

    def to_json(self) -> dict[str, Any]:
        return {"p": self.p, "grid": self.grid, "shrink": self.shrink, "mode": self.mode}


def clip_search(
    x: Tensor,
    fmt: Format,
    clip: Clip,
    *,
    weight: Tensor | None = None,
    gram: Tensor | None = None,
    shared: Params | None = None,
) -> Params:
    """The best grid of each block of ``x (R, C, n)``. ``weight``: broadcast against ``x``; ``gram (C, n, n)``: one matrix a block column.

    Raises ValueError where both are given, or where ``gram`` does not fit.
    """
    if weight is not None and gram is not None:
        raise ValueError("clip_search: give weight or gram, not both")
    if gram is not None and gram.shape != (x.shape[-2], x.shape[-1], x.shape[-1]):
        raise ValueError(f"gram: shape {tuple(gram.shape)} does not fit blocks {tuple(x.shape)}")
    error = _error(x, clip.p, weight, gram)
    shared = fmt.shared(x) if shared is None else shared
    best: Params | None = None
    least = x.new_full(x.shape[:-1], float("inf"))
    for params in _candidates(x, fmt, clip, shared):
        loss = error(fmt.quantize(x, params).sub_(x))
        if best is None:
            best, least = dict(params), loss
            continue
        better = loss < least
        least = torch.where(better, loss, least)
        for key, value in params.items():
            if value.dim():
                best[key] = torch.where(better, value, best[key])
    assert best is not None
    return best


def _candidates(x: Tensor, fmt: Format, clip: Clip, shared: Params) -> Iterator[Params]:
    lo, hi = fmt.range(x)
    yield fmt.params(lo, hi, shared)
    peak = torch.maximum(lo.abs(), hi.abs())
    for i in range(1, max(int(clip.shrink * clip.grid), 1)):
        p = 1 - i / clip.grid
        if clip.mode == "absolute":
            yield fmt.params(torch.maximum(lo, -p * peak), torch.minimum(hi, p * peak), shared)
        else:
            yield fmt.params(lo * p, hi * p, shared)
    if clip.mode == "2d" and isinstance(fmt, Int) and not fmt.sym and fmt.zero == "int":
        for i in range(1, clip.grid + 1):
            step = (hi - lo) * (i / clip.grid) / fmt.code_max
            for zero in range(fmt.code_max + 1):
                found = fmt.params(-zero * step, (fmt.code_max - zero) * step, shared)
                yield found | {"zero_point": torch.full_like(found["zero_point"], zero)}


def _error(x: Tensor, p: float, weight: Tensor | None, gram: Tensor | None) -> Callable[[Tensor], Tensor]:
    """From differences ``(R, C, n)`` (overwritten) to each block's error ``(R, C)``."""
    if gram is not None:
        g = as_like({"g": gram}, x)["g"]

        def through_output(d: Tensor) -> Tensor:
            by_column = d.transpose(0, 1)  # (C, R, n)
            return (torch.bmm(by_column, g) * by_column).sum(-1).T

        return through_output
    w = None if weight is None else weight.to(x.dtype)
    if p == 2:
        return (lambda d: d.square_().sum(-1)) if w is None else (lambda d: d.square_().mul_(w).sum(-1))
    return (lambda d: d.abs_().pow_(p).sum(-1)) if w is None else (lambda d: d.abs_().pow_(p).mul_(w).sum(-1))
