"""Codebooks of vectors in torch: what the C++ kernel must agree with, up to vectors that lie equally near to two centroids."""

from __future__ import annotations

import torch
from torch import Tensor

from dither.kernels.wide import unpack_wide

CHUNK = 1 << 24  # distances that are held at once


def nearest_reference(vectors: Tensor, centroids: Tensor) -> Tensor:
    """Arguments as `dither.kernels.nearest_centroids`. The least ``|c|^2 / 2 - x c``; the first of equal ones."""
    half = centroids.square().sum(1) / 2
    step = max(1, CHUNK // max(1, len(centroids)))
    found = [torch.addmm(half, part, centroids.T, alpha=-1).argmin(1) for part in torch.split(vectors, step)]
    return torch.cat(found).to(torch.int32) if found else vectors.new_zeros(0, dtype=torch.int32)


def sweep_reference(
    values: Tensor, mix: Tensor, centroids: Tensor, residuals: Tensor | None, base: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Arguments as `dither.kernels.sweep_columns`."""
    v, (rows, columns) = centroids.shape[1], values.shape
    codes = torch.empty(rows // v, columns, dtype=torch.int32, device=values.device)
    errors = torch.zeros_like(values)
    for j in range(columns):
        x = torch.addmv(values[:, j], errors[:, :j], mix[j, :j])  # (R v,)
        vectors = x.view(-1, v)
        codes[:, j] = nearest_reference(vectors, centroids)
        q = centroids[codes[:, j].long()]
        if residuals is not None:
            second = nearest_reference(vectors - q, residuals)
            codes[:, j] += second * len(centroids)
            q = q + residuals[second.long()]
        errors[:, j] = q.reshape(-1) - (x if base is None else base[:, j])
    return codes, errors


def decode_reference(
    packed: Tensor, bits: int, count: int, centroids: Tensor, residuals: Tensor | None, group: Tensor | None, rows: int
) -> Tensor:
    """``packed [R, stride]`` codes on ``centroids [G, k, v]``, ``residuals [G, k2, v]``, ``group [N]`` -> ``[rows, N]`` float32."""
    codes = unpack_wide(packed, bits, count).long()  # (R, N)
    size = centroids.shape[1]
    own = torch.zeros(count, dtype=torch.int64, device=codes.device) if group is None else group.long()
    values = centroids[own, codes % size]  # (R, N, v)
    if residuals is not None:
        values = values + residuals[own, codes // size]
    return values.transpose(1, 2).reshape(len(codes) * centroids.shape[2], count)[:rows]
