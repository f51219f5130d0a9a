"""Causal attention, query t seeing keys 0..t:

    O_t = softmax(scale q_t K_{0..t}^T) V_{0..t}

In bfloat16 on processors with AVX512_BF16 one C++ call: products in float32 sums, the softmax in float32, its numbers rounded to bfloat16 before
they are multiplied with the values and normalised after. About T^2 (d + e) / 2 multiply-adds and T^2 / 2 exponentials a head; Q, K, V are read
once and nothing of size T^2 is ever held.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dither.kernels.attention_reference import causal_attention_reference
from dither.kernels.extension import extension, isa, threads


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """``q [B, H, T, d]``, ``k [B, G, T, d]``, ``v [B, G, T, e]``, G divides H -> ``[B, H, T, e]``, in the type of ``q``; dense with heads behind
    tokens, so that joining the heads copies nothing. ``scale``: 1 / sqrt(d) where it is None.

    Raises ValueError where the shapes or types do not fit. Gradients pass (through the torch reference).
    """
    _check(q, k, v)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    native = _native(q, k, v)
    if native is None:
        return causal_attention_reference(q, k, v, scale)
    batch, heads, length, _ = q.shape
    out = torch.empty(batch, length, heads, v.shape[-1], dtype=q.dtype)
    q, k, v = (x.detach() if x.stride(-1) == 1 else x.detach().contiguous() for x in (q, k, v))
    native.attention(q.view(torch.int16), k.view(torch.int16), v.view(torch.int16), scale, out.view(torch.int16), threads())
    return out.transpose(1, 2)


def _native(*operands: Tensor) -> Any | None:
    """The extension where it has a kernel for such operands."""
    if any(x.device.type != "cpu" or x.dtype != torch.bfloat16 for x in operands) or operands[0].shape[-1] % 2:
        return None
    if torch.is_grad_enabled() and any(x.requires_grad for x in operands):
        return None
    native = extension() if isa() in ("", "avx512") else None
    return native if native is not None and native.has_avx512_bf16() else None


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name}: shape {list(x.shape)}, must be [batch, heads, tokens, features]")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name}: {x.dtype} on {x.device}, must be {q.dtype} on {q.device} as q is")
    batch, heads, length, width = q.shape
    groups = k.shape[1]
    if k.shape != (batch, groups, length, width) or not groups or heads % groups:
        raise ValueError(f"k: shape {list(k.shape)}, must be [{batch}, a divisor of {heads}, {length}, {width}]")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v: shape {list(v.shape)}, must be [{batch}, {groups}, {length}, any]")
