"""Few-bit keys and values: rounded as attention reads them, and stored so.

    k' = round(k H),  v' = round(v),  q' = q H         a grid a token and head; H a Hadamard matrix over the head, or 1
    o  = softmax(q' k'^T / sqrt(d) + mask) v'          by the attention that the model had

q H (k H)^T = q k^T, so the rotation costs the float function nothing, and it spreads the few large channels of keys (QuaRot, 2404.00456; keys
come after their rotary embedding, so H cannot be folded into weights). As each row has its own grid, it does not matter when a row is rounded:
without a cache, in any cache of transformers, or in `kv_cache.FewBitCache`, which stores the codes.

Attention that goes through transformers' `AttentionInterface` is reached by registering an attention function there; a model with another
attention is refused. Each such module gets a child, `KVRounding`, that holds the scheme, and a check that it was used.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import EncoderDecoderCache

from dither.errors import ModelError
from dither.formats import Scheme
from dither.quant.inputs import round_rows
from dither.quant.kv_cache import FewBitCache, adopt, few_bit_caches, layer_of, rotated

CHILD = "kv_rounding"
KNOWN = ("sdpa", "eager")  # attentions of transformers that the rounding is put in front of
_OURS = "dither-"  # registered beside each attention of transformers that is used: "dither-sdpa", "dither-eager"

Attention = Callable[..., tuple[Tensor, Tensor | None]]
Rounder = Callable[[Tensor, Scheme], Tensor]  # what `inputs.round_rows` does, or a differentiable stand-in


class KVRounding(nn.Module):
    """What an attention module rounds its keys and values to. ``inner``: the attention that then takes over."""

    def __init__(self, kv: Scheme, rotate: bool, inner: Attention, rounded: Rounder = round_rows) -> None:
        super().__init__()
        self.kv, self.rotate, self.inner, self.rounded = kv, rotate, inner, rounded
        self.used = False

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each ``[B, H, T, d]``; what a `FewBitCache` returned is rounded, and keys rotated, already."""
        self.used = True
        layers = layer_of(key), layer_of(value)
        for layer in layers:
            if layer is not None:
                layer.unread = False
        if self.rotate:
            query = rotated(query)
            key = key if layers[0] is not None else rotated(key)
        if layers[0] is None:
            key = self.rounded(key, self.kv)
        if layers[1] is None:
            value = self.rounded(value, self.kv)
        return query, key, value

    def extra_repr(self) -> str:
        return f"{self.kv}{', rotated heads' if self.rotate else ''}"


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention function registered with transformers."""
    rounding = getattr(module, CHILD, None)
    if not isinstance(rounding, KVRounding):
        raise ModelError(f"{type(module).__name__}: should round its keys and values, but has no {CHILD}; load the checkpoint again")
    query, key, value = rounding(query, key, value)
    return rounding.inner(module, query, key, value, attention_mask, **kwargs)


def few_bit_attention(model: nn.Module, kv: Scheme, rotate: bool, rounded: Rounder = round_rows) -> None:
    """Make every attention of ``model`` round its keys and values to ``kv``, ``rotate`` them first, and cache them in few bits by default.

    ``kv``: dynamic, in blocks of one row. Raises ModelError where an attention does not go through transformers' `AttentionInterface`,
    or goes through one that is none of "sdpa" and "eager".
    """
    found = attention_modules(model)
    for name, (module, interface, eager) in found.items():
        before = _before(getattr(module, "config", None))
        if before not in KNOWN:
            raise ModelError(f"{name}: its attention is {before!r}; few-bit keys and values need one of {', '.join(KNOWN)}: load it so")
        inner = eager if before == "eager" else interface.get_interface(before, eager)
        module.add_module(CHILD, KVRounding(kv, rotate, inner, rounded))
        module.register_forward_hook(_must_have_rounded)
    for name in KNOWN:
        AttentionInterface.register(_OURS + name, attend)
        mask: Any = AttentionMaskInterface._global_mapping[name]
        AttentionMaskInterface.register(_OURS + name, mask)
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation") and _before(config) in KNOWN:
            config._attn_implementation_internal = _OURS + _before(config)  # the setter would write through to those of parts
    hooked: list[str] = []
    for name, module in model.named_modules():  # the outermost that take a cache
        inside = any(name.startswith(f"{outer}." if outer else "") for outer in hooked)
        if not inside and isinstance(module, PreTrainedModel) and "past_key_values" in inspect.signature(module.forward).parameters:
            hooked.append(name)
            module.register_forward_pre_hook(functools.partial(_with_few_bit_cache, kv=kv, rotate=rotate), with_kwargs=True)
            module.register_forward_hook(_cache_was_read)


def _before(config: Any) -> str:
    """The attention that a configuration names, without us."""
    name = getattr(config, "_attn_implementation", None) or "eager"
    return str(name).removeprefix(_OURS)


def attention_modules(model: nn.Module) -> dict[str, tuple[nn.Module, AttentionInterface, Attention]]:
    """The modules that call transformers' attention interface, by name: each with the interface object it calls, and the eager attention
    that it gives as the default. Found in the modules' own code, so it needs no run and no values.

    Raises ModelError where there is none, or where transformers says that some of the model's attention does not use it.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and not module._can_set_attn_implementation():
            raise _refused(type(module).__name__)
    found = {name: (module, *reached) for name, module in model.named_modules() if (reached := _reached(type(module))) is not None}
    if not found:
        raise _refused(type(model).__name__)
    return found


def _refused(name: str) -> ModelError:
    return ModelError(
        f"{name}: its keys and values cannot be rounded, because its attention does not go through transformers' AttentionInterface; "
        "leave kv_bits out"
    )


def _reached(cls: type) -> tuple[AttentionInterface, Attention] | None:
    """The attention interface that the class's own methods mention, and the function that they mention with an attention's arguments."""
    for base in cls.__mro__:
        if base in (PreTrainedModel, nn.Module):
            break  # their methods mention the interface to set it up
        for function in _functions(base):
            named: list[Any] = [function.__globals__.get(name) for name in function.__code__.co_names]
            interfaces = [x for x in named if isinstance(x, AttentionInterface)]
            if interfaces:
                return interfaces[0], next((x for x in named if _is_attention(x)), _no_eager)
    return None


def _functions(cls: type) -> Iterator[types.FunctionType]:
    for member in vars(cls).values():
        function = inspect.unwrap(member) if callable(member) else member
        if isinstance(function, types.FunctionType):
            yield function


def _is_attention(x: Any) -> bool:
    return isinstance(x, types.FunctionType) and list(inspect.signature(x).parameters)[:4] == ["module", "query", "key", "value"]


def _no_eager(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    raise ModelError(f"{type(module).__name__}: has no eager attention; load the model with attn_implementation='sdpa'")


def _must_have_rounded(module: nn.Module, args: Any, output: Any) -> None:
    """After an attention module: it must have come through `attend`."""
    rounding = module.get_submodule(CHILD)
    assert isinstance(rounding, KVRounding)
    if not rounding.used:
        config = getattr(module, "config", None)
        raise ModelError(
            f"{type(module).__name__}: keys and values were not rounded (its attention is {getattr(config, '_attn_implementation', None)!r}); "
            "do not change the attention implementation of a model with few-bit keys and values"
        )
    rounding.used = False


def _with_few_bit_cache(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, kv: Scheme, rotate: bool) -> tuple[Any, Any]:
    """Before the model: a call that would make or fill an empty cache gets, or fills, a few-bit one."""
    given = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
    given = given | given.get("kwargs", {})
    cache: Any = given.get("past_key_values")
    config: Any = getattr(model, "config", None)
    if cache is not None:
        adopt(cache, kv, rotate)
        return args, kwargs
    uses = given.get("use_cache")
    text: Any = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    if not (getattr(text, "use_cache", False) if uses is None else uses) or (model.training and torch.is_grad_enabled()):
        return args, kwargs
    names = list(inspect.signature(model.forward).parameters)
    made: Any = FewBitCache(kv, rotate, text)
    if getattr(config, "is_encoder_decoder", False):
        made = EncoderDecoderCache(made, FewBitCache(kv, rotate, text))
    if names.index("past_key_values") < len(args):  # given by position, as None
        at = names.index("past_key_values")
        return (*args[:at], made, *args[at + 1 :]), kwargs
    return args, kwargs | {"past_key_values": made}


def _cache_was_read(model: nn.Module, args: Any, output: Any) -> None:
    """After the model: what a few-bit cache gave out must have reached `attend` as it was, else it was rotated and rounded twice."""
    for cache in few_bit_caches(getattr(output, "past_key_values", None)):
        if cache.unread:
            raise ModelError(
                f"{type(model).__name__}: changes keys or values between its cache and its attention (layer {cache.unread[0]}), so they cannot "
                "be cached in few bits; run it with use_cache=False"
            )
