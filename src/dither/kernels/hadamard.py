"""Rows times a normalised Hadamard matrix that is given by its Kronecker factors.

    y = x (D_1 x ... x D_r x W) / sqrt(n),     n = d_1 ... d_r power,     W the Walsh-Hadamard matrix of order ``power``

Every D_i holds +-1. n (d_1 + ... + d_r + log2 power) additions a row in float32, whose order is the same on every instruction set, so the
scalar, AVX2 and AVX-512 versions give the same bits. A row stays in the first cache from one factor to the next.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dither.kernels.checks import check
from dither.kernels.extension import extension, isa, threads
from dither.kernels.hadamard_reference import hadamard_rows_reference

LANES = 16  # of the widest vectors


def hadamard_rows(x: Tensor, dense: Sequence[Tensor], power: int = 1) -> Tensor:
    """``x [R, n]`` float32 or bfloat16 times the product of ``dense``, each ``[d, d]`` float32 of +-1, and the Walsh-Hadamard matrix of
    order ``power``; the same shape and dtype. bfloat16 is transformed in float32 and rounded once.

    ``power`` is 1 or a power of two from 16 on; without it the last of several dense factors has at least 16 rows (merge smaller
    ones by `torch.kron`). Raises ValueError for other shapes, dtypes and strides. NaN and inf spread over their row.
    """
    check("x", x, (None, None), (torch.float32, torch.bfloat16))
    for i, signs in enumerate(dense):
        check(f"dense[{i}]", signs, (None, signs.shape[-1] if signs.dim() else None), (torch.float32,))
        if signs.shape[0] != signs.shape[1]:
            raise ValueError(f"dense[{i}]: shape {list(signs.shape)}, must be square")
    if power != 1 and (power < LANES or power & (power - 1)):
        raise ValueError(f"power: must be 1 or a power of two from {LANES} on, not {power}")
    if power == 1 and (not dense or (len(dense) > 1 and dense[-1].shape[0] < LANES)):
        raise ValueError(f"dense: without a power the last of several factors must have at least {LANES} rows")
    n = math.prod(signs.shape[0] for signs in dense) * power
    if n == 0 or x.shape[1] != n:
        raise ValueError(f"x: shape {list(x.shape)}, must be [any, {n}]")
    x = x.detach()
    native = extension() if x.device.type == "cpu" else None
    if native is None:
        return hadamard_rows_reference(x, dense, power)
    y = torch.empty_like(x)
    halves = x.dtype == torch.bfloat16
    native.hadamard(
        x.view(torch.int16) if halves else x,
        [signs.shape[0] for signs in dense],
        _flat(dense, power),
        power,
        y.view(torch.int16) if halves else y,
        isa(),
        threads(),
    )
    return y


def _flat(dense: Sequence[Tensor], power: int) -> Tensor:
    """All sign matrices behind one another. Of the last one, without a power, rows are padded to whole vectors."""
    parts = [signs.flatten() for signs in dense]
    if power == 1:
        width = -(-dense[-1].shape[0] // LANES) * LANES
        parts[-1] = torch.nn.functional.pad(dense[-1], (0, width - dense[-1].shape[0])).flatten()
    return torch.cat(parts) if parts else torch.zeros(0)
