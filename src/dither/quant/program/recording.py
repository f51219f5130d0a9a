"""Runs a model on one token, with a cache that holds nothing, so that a `Recorder` can write down what it does.

No architecture is known here: layers are found by their type, attention is a function registered with transformers, keys and values pass through a
cache that says how many tokens are before this one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin

from dither.quant.linear import QuantEmbedding, QuantLinear, SharedLinear
from dither.quant.program.instructions import Record, Unrecordable
from dither.quant.program.recorder import Recorder, live

ATTENTION = "dither-recorded"
_MARK = "recorded_layer"  # the attribute of keys: the layer of the cache
_SILENT = {"dropout", "scaling", "is_causal", "position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states"}


class RecordedLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Says that it holds ``length`` tokens, and hands on the keys and values of one more."""

    is_sliding = False

    def __init__(self, index: int, length: int) -> None:
        self.index, self.length, self.is_initialized = index, length, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: it holds nothing."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        setattr(key_states, _MARK, (self.index, value_states))
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1


_recorders: list[Recorder] = []  # the one at work, if one is


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> tuple[Tensor, None]:
    """The attention function registered with transformers."""
    index, cached = getattr(key, _MARK, (None, None))
    if index is None or cached is not value:
        raise Unrecordable("keys or values change between cache and attention")
    extra = [name for name, x in kwargs.items() if name not in _SILENT and x is not None and x is not False]
    if attention_mask is not None or extra:
        raise Unrecordable(f"attention with {', '.join(extra) or 'a mask'}")
    scale = kwargs.get("scaling")
    return _recorders[-1].attention(index, query, key, value, query.shape[-1] ** -0.5 if scale is None else float(scale)), None


AttentionInterface.register(ATTENTION, _attend)


@contextmanager
def _modules(model: nn.Module, to: Recorder) -> Iterator[None]:
    """Within it, layers and tables of ``model`` tell ``to`` what they do."""
    with ExitStack() as stack:
        for module in model.modules():
            if type(module) is nn.Linear or isinstance(module, QuantLinear | SharedLinear):
                write: Any = to.linear
            elif isinstance(module, nn.Embedding | QuantEmbedding):
                write = to.lookup
            else:
                continue
            forward = module.forward
            stack.enter_context(mock.patch.object(module, "forward", functools.partial(_seen, write, module, forward)))
        yield


def _seen(write: Callable[..., Tensor], module: nn.Module, forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    if kwargs or len(args) != 1:
        raise Unrecordable(f"{type(module).__name__} is called with more than a tensor")
    return write(module, forward, args[0])


@contextmanager
def _named(model: nn.Module) -> Iterator[None]:
    """Within it, the model's attention is `_attend`, and no masks are made."""
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(c): c for c in found if hasattr(c, "_attn_implementation")}.values()
    before = [(c, c._attn_implementation_internal) for c in configs]
    for config, _ in before:
        config._attn_implementation_internal = ATTENTION  # the setter would write through to those of parts
    try:
        yield
    finally:
        for config, name in before:
            config._attn_implementation_internal = name


def record(model: nn.Module, layers: int, place: int) -> Record:
    """One token at ``place``, behind as many others, with a cache of so many layers. Raises Unrecordable."""
    with torch.inference_mode(False), torch.no_grad():
        ids, places = torch.ones(1, 1, dtype=torch.long), torch.full((1, 1), place)
        recorder = Recorder(ids, places)
        cache = Cache(layers=[RecordedLayer(i, place) for i in range(layers)])
        _recorders.append(recorder)
        try:
            with _modules(model, recorder), _named(model), recorder:
                recorder.record.logits = model(input_ids=ids, position_ids=places, past_key_values=cache, use_cache=True).logits
        except Unrecordable:
            raise
        except Exception as error:  # a model may look into its cache, its arguments or its layers in as many ways as there are models
            raise Unrecordable(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
        finally:
            _recorders.pop()
    return live(recorder)
