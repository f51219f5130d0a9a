"""The attention function that a model takes from transformers' registry, for a while."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn


def attention_configs(model: nn.Module) -> list[Any]:
    """The configs that name an attention, each once: for `attention_named`, which may be entered at every step."""
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    return list({id(config): config for config in found if hasattr(config, "_attn_implementation")}.values())


@contextmanager
def attention_named(name: str, configs: Sequence[Any]) -> Iterator[None]:
    """Within it, attention of the model with these `attention_configs` is the function registered as ``name``, and no masks are made."""
    before = [(c, c._attn_implementation_internal) for c in configs]
    for config, _ in before:
        config._attn_implementation_internal = name  # the setter would write through to those of parts
    try:
        yield
    finally:
        for config, theirs in before:
            config._attn_implementation_internal = theirs
