"""Causal attention in torch, in pieces of queries that see only the keys up to their end: (1 + P) / 2P of the products for P pieces.

What the C++ kernel must agree with, and what runs where gradients are asked for and on processors without AVX512_BF16: torch's own CPU kernel
multiplies every query with all keys of the sequence and masks half of the products afterwards.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

PIECE = 128  # queries of a sequence in one piece, at least
ROWS = 2304  # queries of all heads and sequences in one piece, at least: smaller products cost more to hand out than to do


def causal_attention_reference(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """``q [B, H, T, d]``, ``k [B, G, T, d]``, ``v [B, G, T, e]`` -> ``[B, H, T, e]``, in the type of ``q``; gradients pass."""
    batch, heads, length, width = q.shape
    groups, shared = k.shape[1], heads // k.shape[1]  # the queries of all heads that share keys are rows of one product
    q = (q * scale).view(batch, groups, shared, length, width)
    k = k.mT
    piece = max(PIECE, ROWS // (batch * heads))
    future = torch.full((piece, piece), -math.inf, dtype=q.dtype, device=q.device).triu_(1)
    pieces = []
    for first in range(0, length, piece):
        last = min(first + piece, length)
        rows = shared * (last - first)
        logits = torch.bmm(
            q[:, :, :, first:last].reshape(batch * groups, rows, width), k[..., :last].reshape(batch * groups, width, last)
        )
        logits.view(-1, shared, last - first, last)[..., first:] += future[: last - first, : last - first]
        out = torch.bmm(logits.softmax(-1), v[:, :, :last].reshape(batch * groups, last, -1))
        pieces.append(out.view(batch, groups, shared, last - first, -1).permute(0, 3, 1, 2, 4))
    return torch.cat(pieces, 1).view(batch, length, heads, -1).transpose(1, 2)
