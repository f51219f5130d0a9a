"""Gram matrices in torch: what the C++ kernel must agree with."""

from __future__ import annotations

from torch import Tensor

ROWS = 512  # whose products are summed in float32
PANEL = 192  # columns of the upper triangle computed at once


def gram_update_reference(hessian: Tensor, x: Tensor) -> None:
    """``hessian [I, I]`` float64 ``+= x^T x``, the upper triangle of blocks only; ``x [T, I]`` float32 or bfloat16."""
    for start in range(0, x.shape[0], ROWS):
        rows = x[start : start + ROWS].float()
        for first in range(0, x.shape[1], PANEL):
            last = min(first + PANEL, x.shape[1])
            hessian[:last, first:last] += rows[:, :last].T @ rows[:, first:last]


def gram_finish_reference(hessian: Tensor) -> Tensor:
    lower = hessian.triu(1).T
    return hessian.triu_().add_(lower)
