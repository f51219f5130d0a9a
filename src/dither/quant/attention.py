"""Causal attention in less processor time than torch's on CPUs, for the passes over calibration data and the reading of prompts: the name in torch's
functional module stands for `dither.kernels.causal_attention` meanwhile. Calls that are not plainly causal (masks, dropout, one query) go to torch
unchanged.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dither.kernels import causal_attention

SHORT = 128  # tokens of sequences that are left to torch: their attention is a small part of a block's work


_theirs = functional.scaled_dot_product_attention
_lock = threading.Lock()
_inside = 0  # of `cheap_attention`, by any thread


@contextmanager
def cheap_attention() -> Iterator[None]:
    """Within it, causal bfloat16 attention on the CPU takes `causal_attention`; everything else is as it was. A mode that saw every call would
    cost more than it saves. Several threads may be within it."""
    global _theirs, _inside
    with _lock:
        if _inside == 0:
            _theirs, functional.scaled_dot_product_attention = functional.scaled_dot_product_attention, _ours
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                functional.scaled_dot_product_attention = _theirs


def _ours(*args: Any, **kwargs: Any) -> Tensor:
    if not _plainly_causal(*args, **kwargs):
        return _theirs(*args, **kwargs)
    query, key, value = (args[i] if i < len(args) else kwargs[name] for i, name in enumerate(("query", "key", "value")))
    return causal_attention(query, key, value, kwargs.get("scale"))


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
        and query.shape[2] == key.shape[2] > SHORT
    )
