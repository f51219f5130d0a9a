"""A cache for one token each of several sequences, which lie side by side along the token axis: row i goes to sequence i's own cache, and attends
to nothing else.

    k, v [1, H, n, d]  ->  sequence i's cache gets k[:, :, i], v[:, :, i];   o[:, i] = attention(q[:, :, i], K_i, V_i)

A model passes what its cache returns to its attention. `RowsCache.update` returns the new rows, marked with the keys and values that each of
them sees, and `attend`, registered with transformers under `NAME`, finds them there and calls the attention that the model had, a row at a time: so
a row's numbers are those of the sequence alone, whatever the attention, and whatever the cache. Rows beyond the sequences are filling: they attend to
nothing and come out as zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from dither.errors import ModelError
from dither.quant.kv_cache import FewBitCache, FewBitLayer

NAME = "dither-rows"
_MARK = "rows_layer"  # the attribute of keys: the layer of the cache
_SPARE = 64  # tokens that a growing buffer has room for at the least

Attention = Callable[..., tuple[Tensor, Tensor | None]]


class RowsLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer of the cache. ``layers``: of the sequences' caches. ``seen``: keys and values of each row, until attention has read them."""

    is_sliding = False

    def __init__(self, layers: Sequence[Any], inner: Mapping[nn.Module, Attention]) -> None:
        self.layers, self.inner = layers, inner
        self.seen: list[tuple[Tensor, Tensor]] | None = None
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: it holds nothing itself."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """``[1, H, n, d]``, a row a sequence, filling behind them."""
        rows = zip(self.layers, torch.split(key_states, 1, 2), torch.split(value_states, 1, 2), strict=False)
        self.seen = [layer.update(key, value) for layer, key, value in rows]
        setattr(key_states, _MARK, self)
        return key_states, value_states

    def get_seq_length(self) -> int:
        return max(int(layer.get_seq_length()) for layer in self.layers)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1


class RowsCache(Cache):
    """Over the caches of several sequences, for one call of the model."""

    def __init__(self, caches: Sequence[Cache], inner: Mapping[nn.Module, Attention]) -> None:
        super().__init__(layers=[RowsLayer(layers, inner) for layers in zip(*(c.layers for c in caches), strict=True)])

    def check_read(self) -> None:
        """Raises ModelError where a layer's keys and values did not reach `attend`."""
        left = [i for i, layer in enumerate(self.layers) if layer.seen is not None]  # type: ignore[union-attr]
        if left:
            raise ModelError(f"the keys and values of layer {left[0]} did not reach its attention as they were cached")


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """``query [1, H, n, d]`` -> ``[1, n, H, d]``: each row by the attention that the module had, without a mask."""
    layer: RowsLayer | None = getattr(key, _MARK, None)
    if layer is None or layer.seen is None:
        raise ModelError(f"{type(module).__name__}: changes keys or values between its cache and its attention")
    inner, seen, layer.seen = layer.inner[module], layer.seen, None
    rows = [inner(module, q, k, v, None, **kwargs)[0] for q, (k, v) in zip(torch.split(query, 1, 2), seen, strict=False)]
    output = rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)
    filling = query.shape[2] - len(rows)
    return F.pad(output, (0, 0, 0, 0, 0, filling)) if filling else output, None


AttentionInterface.register(NAME, attend)


class GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values in buffers with room for more tokens, so that a new one costs its own bytes. ``keys`` and ``values`` are what is filled."""

    def __init__(self, layer: DynamicLayer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        assert layer.keys is not None and layer.values is not None
        self.dtype, self.device, self.is_initialized = layer.dtype, layer.device, True
        self.length = layer.keys.shape[-2]
        self._grow((layer.keys, layer.values), self.length)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start, self.length = self.length, self.length + key_states.shape[-2]
        if self.length > self.buffers[0].shape[-2]:
            assert self.keys is not None and self.values is not None
            self._grow((self.keys, self.values), self.length)
        self.buffers[0][:, :, start : self.length] = key_states
        self.buffers[1][:, :, start : self.length] = value_states
        self.keys, self.values = self.buffers[0][:, :, : self.length], self.buffers[1][:, :, : self.length]
        return self.keys, self.values

    def _grow(self, held: tuple[Tensor, Tensor], length: int) -> None:
        room = length + max(_SPARE, length // 8)
        self.buffers = [t.new_empty(*t.shape[:2], room, t.shape[3]) for t in held]
        for buffer, t in zip(self.buffers, held, strict=True):
            buffer[:, :, : t.shape[2]] = t
        self.keys, self.values = (b[:, :, : t.shape[2]] for b, t in zip(self.buffers, held, strict=True))


def make_growing(cache: Any) -> None:
    """Let the plain layers of a filled cache grow in place. Raises ModelError where the cache is of a kind that cannot be served row by row."""
    if type(cache) not in (DynamicCache, FewBitCache) or not all(type(x) in _KNOWN for x in cache.layers):
        kinds = sorted({type(x).__name__ for x in getattr(cache, "layers", [])} - {x.__name__ for x in _KNOWN}) or [type(cache).__name__]
        raise ModelError(f"its cache holds {', '.join(kinds)}")
    cache.layers = [GrowingLayer(x) if type(x) is DynamicLayer else x for x in cache.layers]


_KNOWN = (DynamicLayer, DynamicSlidingWindowLayer, FewBitLayer)
