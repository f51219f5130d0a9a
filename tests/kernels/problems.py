"""Small problems for the kernels: Hessians, factors, grids."""

from __future__ import annotations

import torch
from torch import Tensor

from dither.kernels import AffineGrid


def unaligned(x: Tensor) -> Tensor:
    """The same values at an address that is aligned to nothing but the element."""
    moved = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)
    moved.copy_(x)
    return moved


def hessian(columns: int, seed: int, damp: float = 0.01) -> Tensor:
    """A damped Hessian of correlated inputs, ``[I, I]`` float64."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=g, dtype=torch.float64)
    x = torch.randn(2 * columns + 3, columns, generator=g, dtype=torch.float64) @ mix
    h = x.T @ x / len(x)
    h.diagonal().add_(damp * h.diagonal().mean())
    return h


def factor(h: Tensor) -> Tensor:
    """``U`` upper triangular with ``H^-1 = U^T U``, by the textbook route: two Cholesky factorisations and an inverse.
    """
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h))).T.contiguous()


def affine_grid(weight: Tensor, groups: int, bits: int) -> tuple[AffineGrid, Tensor]:
    """Min-max grids of ``groups`` contiguous groups with float16 scales, and each column's group."""
    columns = weight.shape[1]
    column_group = torch.arange(columns) * groups // max(columns, 1)
    top = 2**bits - 1
    low = torch.zeros(weight.shape[0], groups, dtype=weight.dtype)
    high = low.clone()
    for g in range(groups):
        inside = weight[:, column_group == g]
        if inside.numel():
            low[:, g], high[:, g] = inside.amin(1).clamp(max=0), inside.amax(1).clamp(min=0)
    scale = ((high - low) / top).half().to(weight.dtype).clamp(min=2**-24)
    return AffineGrid(scale, torch.round(-low / scale), top), column_group
