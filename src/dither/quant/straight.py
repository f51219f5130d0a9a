"""Rounding that gradients pass straight through, the ends of its ranges included: what a model is trained under that will be rounded later.

With w the width of a block's range (hi - lo), x_hat = w f(x / w) for every format whose grid follows the range, and f' = 1 by decree:

    d x_hat = dx + (x_hat - x) dw / w                     within the grid
    d x_hat = x_hat dw / w                                beyond its ends, where it clips

dw = d(max) - d(min), which the largest and smallest values of the block get; so an outlier learns what it costs its neighbours. Dynamic ranges do
not clip. (OSTQuant, arXiv 2501.13987, and its code; the scale's part is LSQ's gradient, arXiv 1902.08153.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from dither.formats import Scheme
from dither.formats.blocks import Piece
from dither.quant.inputs import round_rows

RATIOS = tuple(1 - i / 20 for i in range(11))  # of a range, that are searched


def straight_rows(x: Tensor, scheme: Scheme) -> Tensor:
    """``inputs.round_rows`` of ``x [..., I]``, to the same bits, with a gradient. Raises ValueError for NaN and inf."""
    rows = x.reshape(-1, x.shape[-1])
    with torch.no_grad():
        error = round_rows(rows, scheme).float() - rows.float()
    pieces = list(scheme.blocks.pieces(*rows.shape))

    def straight(piece: Piece) -> Tensor:
        blocks = piece.blocked(rows.float())
        return piece.unblocked(blocks + piece.blocked(error) * _relative_width(blocks, scheme)[..., None]).to(x.dtype)

    if len(pieces) == 1:
        return straight(pieces[0]).view(x.shape)
    found = torch.empty_like(rows)
    for piece in pieces:
        found[piece.rows, piece.columns] = straight(piece)
    return found.view(x.shape)


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
