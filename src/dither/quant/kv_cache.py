"""A cache of keys and values that holds few bits: for each token and head a row of packed codes and what its blocks need to be decoded.

    append   rotate the new keys, fit each row's own grid, pack codes; old rows are never touched again
    read     decode all rows, in the model's type: exactly what rounding without a cache gives (`quant.inputs.round_rows`)

Bytes a row of d values at b bits, with G blocks: 4 ceil(d b / 32) + 2 G (float16 scales) + G (zero points, a byte each). Appending is amortised
O(1): buffers grow by an eighth. Reading costs a pass over all rows, as attention does itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, EncoderDecoderCache

from dither.errors import ModelError
from dither.formats import Params, Scheme
from dither.formats.packing import pack_rows
from dither.formats.scales import STORAGE
from dither.special.hadamard import apply_hadamard

_MARK = "few_bit_layer"  # the attribute of tensors that come from such a cache: the layer of the cache
_SPARE = 64  # tokens that a growing buffer has room for at the least


def layer_of(states: Tensor) -> FewBitLayer | None:
    """The cache layer that keys or values were read from; None where they were not rounded yet."""
    found: FewBitLayer | None = getattr(states, _MARK, None)
    return found


def rotated(states: Tensor) -> Tensor:
    """``x H`` over the last dimension. Raises ModelError where no Hadamard matrix of that order is known."""
    try:
        return apply_hadamard(states)
    except ValueError as error:
        raise ModelError(f"heads of {states.shape[-1]} channels cannot be rotated ({error})") from None


class Rows:
    """Few-bit rows ``[T, B, H, d]`` that grow along T and may be dropped at both ends. ``kv``: a scheme with blocks of one row."""

    def __init__(self, kv: Scheme, dtype: torch.dtype) -> None:
        self.kv, self.dtype = kv, dtype
        self.buffers: dict[str, Tensor] = {}  # each [room, B, H, ...]
        self.first = self.end = 0
        self.width = 0  # d

    def __len__(self) -> int:
        return self.end - self.first

    @property
    def nbytes(self) -> int:
        """Bytes held, spare room included."""
        return sum(buffer.nbytes for buffer in self.buffers.values())

    def append(self, states: Tensor) -> None:
        """``states [B, H, T, d]``."""
        batch, heads, tokens, self.width = states.shape
        rows = states.detach().permute(2, 0, 1, 3).reshape(-1, self.width)
        if rows.dtype != torch.float64:
            rows = rows.float()
        params = self.kv.fit(rows)
        stored = {"codes": pack_rows(self.kv.encode(rows, params), self.kv.format.bits)}
        for key in self.kv.format.param_bits():
            stored[key] = params[key].to(self._storage(key))
        self._room(tokens, {key: (batch, heads, value.shape[1]) for key, value in stored.items()}, stored)
        for key, value in stored.items():
            self.buffers[key][self.end : self.end + tokens] = value.view(tokens, batch, heads, -1)
        self.end += tokens

    def read(self) -> Tensor:
        """All rows, decoded, ``[B, H, T, d]``."""
        held = {key: buffer[self.first : self.end] for key, buffer in self.buffers.items()}
        tokens, batch, heads, stride = held["codes"].shape
        rows = tokens * batch * heads
        params: Params = {k: v.reshape(rows, -1).float() for k, v in held.items() if k != "codes"}
        compute = self.dtype if self.dtype == torch.bfloat16 else torch.float32
        values = self.kv.decode_packed(held["codes"].reshape(rows, stride), params, (rows, self.width), compute)
        return values.to(self.dtype).view(tokens, batch, heads, self.width).permute(1, 2, 0, 3)

    def change_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply ``change`` to every buffer ``[T, B, H, ...]``, along B."""
        self.buffers = {key: change(buffer) for key, buffer in self.buffers.items()}

    def _storage(self, key: str) -> torch.dtype:
        if key == "zero_point":
            return torch.uint8
        return torch.float16 if key == "offset" else STORAGE[self.kv.format.scale]  # type: ignore[attr-defined]

    def _room(self, tokens: int, shapes: dict[str, tuple[int, ...]], like: dict[str, Tensor]) -> None:
        """Make place for ``tokens`` more at the end: live rows move to the front of buffers that are an eighth larger."""
        room = next(iter(self.buffers.values())).shape[0] if self.buffers else 0
        if self.buffers and self.end + tokens <= room:
            return
        live = len(self)
        size = live + tokens if live == 0 else live + tokens + max(_SPARE, live // 8)
        with torch.inference_mode(False):  # else later calls outside of inference mode could not write to them
            grown = {k: torch.empty(size, *shape, dtype=like[k].dtype, device=like[k].device) for k, shape in shapes.items()}
        for key, buffer in self.buffers.items():
            grown[key][:live] = buffer[self.first : self.end]
        self.buffers, self.first, self.end = grown, 0, live


class FewBitLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """One layer of the cache. ``window``: tokens that sliding attention sees (None: all); older ones are dropped.

    ``unread``: whether keys or values were handed out that no attention has taken as already rounded, see `quant.kv`.
    """

    def __init__(self, kv: Scheme, rotate: bool, window: int | None = None, record_past: bool = False) -> None:
        # not the base's, which sets keys and values
        self.kv, self.rotate, self.window, self.record_past = kv, rotate, window, record_past
        self.is_sliding = window is not None
        self.reset()

    def reset(self) -> None:
        self.is_initialized = False
        self.rows: tuple[Rows, Rows] | None = None
        self.cumulative_length = 0
        self.unread = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.rows = Rows(self.kv, key_states.dtype), Rows(self.kv, value_states.dtype)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new keys and values ``[B, H, T, d]``; returns all that the new tokens may see, decoded (keys rotated)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.rows is not None
        if self.rotate:
            key_states = rotated(key_states)
        tokens = key_states.shape[-2]
        for rows, states in zip(self.rows, (key_states, value_states), strict=True):
            rows.append(states)
        self.cumulative_length += tokens
        keys, values = self.rows[0].read(), self.rows[1].read()
        if self.window is not None and self.record_past:
            seen = self.window - 1 + tokens
            keys, values = keys[:, :, -seen:], values[:, :, -seen:]
        else:
            self._slide()
        return self._marked(keys), self._marked(values)

    def _slide(self) -> None:
        if self.window is not None and self.rows is not None:
            for rows in self.rows:
                rows.first = max(rows.first, rows.end - self.window + 1)

    def _marked(self, states: Tensor) -> Tensor:
        setattr(states, _MARK, self)
        self.unread = True
        return states

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """Decoded, rotated where the layer rotates."""
        return None if self.rows is None else self._marked(self.rows[0].read())

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        return None if self.rows is None else self._marked(self.rows[1].read())

    @property
    def nbytes(self) -> int:
        return 0 if self.rows is None else sum(rows.nbytes for rows in self.rows)

    def activate_past_recording(self) -> None:
        self.record_past = True

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_max_length(self) -> int:
        return -1 if self.window is None else self.window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.window is None:
            return self.cumulative_length + query_length, 0
        return min(self.cumulative_length, self.window - 1) + query_length, max(self.cumulative_length - self.window + 1, 0)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens. A sliding layer that is full can do so only while it records the past."""
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove: counts down, so it must be 0 or negative, not {tokens_to_remove}")
        if self.rows is None:
            return
        count = min(-tokens_to_remove, self.cumulative_length)
        if self.window is not None and self.cumulative_length >= self.window and not self.record_past:
            raise RuntimeError("crop: the window is full and its past was not recorded; call activate_past_recording first")
        for rows in self.rows:
            rows.end -= count
        self.cumulative_length -= count
        self._slide()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        for rows in self.rows or ():
            rows.change_batch(lambda buffer: buffer.repeat_interleave(repeats, dim=1))

    def batch_select_indices(self, indices: Tensor) -> None:
        for rows in self.rows or ():
            rows.change_batch(lambda buffer: buffer.index_select(1, indices.to(buffer.device)))


class FewBitCache(DynamicCache):
    """A cache of transformers whose attention layers are `FewBitLayer`. ``config``: of the model, for the kinds of its layers (sliding windows;
    states of linear attention stay as they are)."""

    def __init__(self, kv: Scheme, rotate: bool = False, config: Any = None) -> None:
        super().__init__(config=config)
        self.become_few_bit(kv, rotate)

    def become_few_bit(self, kv: Scheme, rotate: bool) -> None:
        self.layers = [_few_bit(layer, kv, rotate) for layer in self.layers]
        if self.layer_class_to_replicate is not None:
            self.layer_class_to_replicate = functools.partial(FewBitLayer, kv, rotate)  # type: ignore[assignment]

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values held."""
        return cache_bytes(self)

    @property
    def unread(self) -> list[int]:
        """Layers whose keys or values no attention took as already rounded."""
        return [i for i, layer in enumerate(self.layers) if isinstance(layer, FewBitLayer) and layer.unread]


def adopt(cache: Any, kv: Scheme, rotate: bool) -> None:
    """Make an empty `DynamicCache` (or the two of an encoder-decoder) few-bit, in place: whoever made it keeps holding it.

    Caches of other classes and those that hold something stay: attention then rounds what they return, so numbers are the same.
    """
    if isinstance(cache, EncoderDecoderCache):
        adopt(cache.self_attention_cache, kv, rotate)
        adopt(cache.cross_attention_cache, kv, rotate)
    elif type(cache) is DynamicCache and not cache.offloading and not any(getattr(x, "is_initialized", False) for x in cache.layers):
        cache.__class__ = FewBitCache
        cache.become_few_bit(kv, rotate)  # type: ignore[attr-defined]


def few_bit_caches(cache: Any) -> list[FewBitCache]:
    """The few-bit caches in whatever a model returned as its cache."""
    if isinstance(cache, EncoderDecoderCache):
        return few_bit_caches(cache.self_attention_cache) + few_bit_caches(cache.cross_attention_cache)
    return [cache] if isinstance(cache, FewBitCache) else []


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values that any dynamic cache holds."""
    total = 0
    for layer in cache.layers:
        if isinstance(layer, FewBitLayer):
            total += layer.nbytes
        else:
            total += sum(t.nbytes for name in ("keys", "values") if isinstance(t := getattr(layer, name, None), Tensor))
    return total


def _few_bit(layer: Any, kv: Scheme, rotate: bool) -> Any:
    if type(layer) is DynamicLayer:
        return FewBitLayer(kv, rotate)
    if type(layer) is DynamicSlidingWindowLayer:
        return FewBitLayer(kv, rotate, layer.sliding_window, layer.record_past)
    return layer
