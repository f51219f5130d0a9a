"""Rounding that gradients pass straight through, the ends of its ranges included: what a model is trained under that will be rounded later.

With w the width of a block's range (hi - lo), x_hat = w f(x / w) for every format whose grid follows the range, and f' = 1 by decree:

    d x_hat = dx + (x_hat - x) dw / w                     within the grid
    d x_hat = x_hat dw / w                                beyond its ends, where it clips

dw = d(max) - d(min), which the largest and smallest values of the block get; so an outlier learns what it costs its neighbours. Dynamic ranges do
not clip. (OSTQuant, arXiv 2501.13987, and its code; the scale's part is LSQ's gradient, arXiv 1902.08153.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dither.formats import Scheme
from dither.quant.inputs import round_rows

RATIOS = tuple(1 - i / 20 for i in range(11))  # of a range, that are searched


def straight_rows(x: Tensor, scheme: Scheme) -> Tensor:
    """``inputs.round_rows`` of ``x [..., I]``, to the same bits, with a gradient. Raises ValueError for NaN and inf.

    Of equal largest (smallest) values the first one is the end of its block. Kept for the backward pass: x and the result.
    """
    rounded: Tensor = _StraightRows.apply(x.reshape(-1, x.shape[-1]), scheme)  # type: ignore[no-untyped-call]
    return rounded.view(x.shape)


class _StraightRows(torch.autograd.Function):
    """By hand, since autograd takes some twenty passes over x in float32 where six in its own type do."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, scheme: Scheme) -> Tensor:
        rounded = round_rows(rows, scheme)
        ctx.save_for_backward(rows, rounded)
        ctx.scheme = scheme
        return rounded

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (rows, rounded), scheme = ctx.saved_tensors, ctx.scheme
        found = gradient.clone(memory_format=torch.contiguous_format)
        error = (rounded - rows).mul_(gradient)
        for piece in scheme.blocks.pieces(*rows.shape):
            worth = piece.blocked(error).sum(-1, dtype=torch.float32)  # of a relative change of the width, [R, C]
            blocks = piece.blocked(rows)
            (lo, at_lo), (hi, at_hi) = blocks.min(-1), blocks.max(-1)
            with torch.enable_grad():
                ends = torch.stack([lo, hi], -1).float().requires_grad_()
                (at_ends,) = torch.autograd.grad(_relative_width(ends, scheme), ends, worth)
            moved = piece.blocked(found)
            moved.scatter_add_(-1, torch.stack([at_lo, at_hi], -1), at_ends.to(moved.dtype))
            if moved.untyped_storage().data_ptr() != found.untyped_storage().data_ptr():  # a copy, where blocks are no view of the rows
                found[piece.rows, piece.columns] = piece.unblocked(moved)
        return found, None


def straight_weight(weight: Tensor, scheme: Scheme, ratios: Tensor) -> Tensor:
    """``weight [O, I]`` on grids that span ``ratios`` (as `clip_ratios` finds them) of each block's range; with a gradient."""
    found = torch.empty_like(weight)
    with torch.no_grad():
        shared = scheme.format.shared(weight.float())
    for piece in scheme.blocks.pieces(*weight.shape):
        blocks = piece.blocked(weight.float())
        with torch.no_grad():
            rounded = _on(blocks, scheme, ratios[piece.grid_rows, piece.grid_columns], shared)
            lo, hi = rounded.amin(-1, keepdim=True), rounded.amax(-1, keepdim=True)
            inside = (blocks >= lo) & (blocks <= hi)
            error = rounded - blocks
        relative = _relative_width(blocks, scheme)[..., None]
        y = torch.where(inside, blocks + error * relative, rounded * relative)
        found[piece.rows, piece.columns] = piece.unblocked(y).to(weight.dtype)
    return found


@torch.no_grad()
def clip_ratios(weight: Tensor, scheme: Scheme) -> Tensor:
    """The share of each block's range (``scheme.blocks.grid_shape``) that costs least squared error, of 1, 0.95, ... 0.5."""
    w = weight.float()
    found, shared = torch.ones(scheme.blocks.grid_shape(*w.shape)), scheme.format.shared(w)
    for piece in scheme.blocks.pieces(*w.shape):
        blocks = piece.blocked(w)
        errors = torch.stack([(_on(blocks, scheme, torch.full(blocks.shape[:-1], p), shared) - blocks).square().sum(-1) for p in RATIOS])
        found[piece.grid_rows, piece.grid_columns] = torch.tensor(RATIOS)[errors.argmin(0)]
    return found


def _on(blocks: Tensor, scheme: Scheme, ratios: Tensor, shared: dict[str, Tensor]) -> Tensor:
    """``blocks [R, C, n]`` rounded on grids over ``ratios [R, C]`` of their ranges."""
    lo, hi = scheme.format.range(blocks)
    return scheme.format.quantize(blocks, scheme.format.params(lo * ratios, hi * ratios, shared or None))


def _relative_width(blocks: Tensor, scheme: Scheme) -> Tensor:
    """``w / w`` with the gradient of w in the numerator only: 1 everywhere, ``[R, C]``."""
    lo, hi = scheme.format.range(blocks)
    width = torch.where(lo < hi, hi - lo, hi + lo)  # of the symmetric format that keeps its extreme's sign, lo may be hi
    fixed = width.detach()
    return torch.where(fixed > 0, width / torch.where(fixed > 0, fixed, 1.0), 1.0)
