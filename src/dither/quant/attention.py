"""Causal attention in less processor time than torch's on CPUs, for the passes over calibration data.

torch's CPU kernel multiplies every query with all keys of the sequence and masks half of the products afterwards; in bfloat16 its products
also run far below the processor's speed. Within `cheap_attention`, causal calls are cut into pieces of queries, and each piece
sees only the keys up to its own end:

    O_p = softmax(Q_p K_{..p}^T / sqrt(d) + mask) V_{..p}           (1 + P) / 2P of the products, P pieces

The same function up to the order of sums; gradients (half the time of torch's) pass through.
Calls that are not plainly causal (masks, dropout, one query) go to torch unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional

PIECE = 128  # queries of a sequence in one piece, at least
ROWS = 2304  # queries of all heads and sequences in one piece, at least: smaller products cost more to hand out than to do


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """``q [B, H, T, d]``, ``k [B, G, T, d]``, ``v [B, G, T, e]``, G divides H -> ``[B, H, T, e]``, in the type of ``q``."""
    batch, heads, length, width = q.shape
    groups, shared = k.shape[1], heads // k.shape[1]  # the queries of all heads that share keys are rows of one product
    q = (q * (1 / math.sqrt(width) if scale is None else scale)).view(batch, groups, shared, length, width)
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


@contextmanager
def cheap_attention() -> Iterator[None]:
    """Within it, causal bfloat16 attention on the CPU takes `causal_attention`; everything else is as it was. The name in torch's
    functional module stands for another function meanwhile: a mode that sees every call would cost more than it saves."""
    theirs = functional.scaled_dot_product_attention

    def ours(*args: Any, **kwargs: Any) -> Tensor:
        if not _plainly_causal(*args, **kwargs):
            return theirs(*args, **kwargs)
        query, key, value = (args[i] if i < len(args) else kwargs[name] for i, name in enumerate(("query", "key", "value")))
        return causal_attention(query, key, value, kwargs.get("scale"))

    with mock.patch.object(functional, "scaled_dot_product_attention", ours):
        yield


def _plainly_causal(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False, **_: Any
) -> bool:
    return (
        is_causal
        and attn_mask is None
        and dropout_p == 0.0
        and query.device.type == "cpu"
        and query.dtype == torch.bfloat16
        and query.dim() == 4
        and query.shape[2] == key.shape[2] > PIECE
    )
