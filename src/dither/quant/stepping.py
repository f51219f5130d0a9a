"""The model one token at a time, and what it says about where to stop."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from dither.errors import ModelError


class Stepper:
    """One sequence: by the model's key-value cache where it has one, else by reading everything again. ``ids [1, N]``: the prompt."""

    def __init__(self, model: nn.Module, ids: Tensor) -> None:
        self.model, self.ids, self.length = model, ids, ids.shape[1]
        self.cache: Any = None
        accepts = inspect.signature(model.forward).parameters
        self.cached = "past_key_values" in accepts
        self.options: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in accepts else {}

    def logits(self) -> Tensor:
        """Of the next token, ``[V]`` float32, on the CPU. Raises ModelError where the model is no language model."""
        if self.cached:
            output = self.model(input_ids=self.ids, past_key_values=self.cache, use_cache=True, **self.options)
            self.cache = getattr(output, "past_key_values", None)
            self.cached = self.cache is not None
        else:
            output = self.model(input_ids=self.ids, **self.options)
        logits = getattr(output, "logits", None)
        if logits is None:
            raise ModelError(f"{type(self.model).__name__}: gives no next-token scores, so it is no language model")
        row: Tensor = logits[0, -1].float().cpu()
        return row

    def append(self, token: int) -> None:
        """What `logits` will read next."""
        new = torch.tensor([[token]], device=self.ids.device)
        self.ids = new if self.cached else torch.cat([self.ids, new], dim=1)
        self.length += 1

    def copy(self) -> Stepper:
        """The same sequence again, to go on in another way."""
        twin = copy.copy(self)
        twin.cache = copy.deepcopy(self.cache)
        return twin


def positions(model: nn.Module) -> int | None:
    """How many tokens the model can place; None where it does not say."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit = getattr(text, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def end_tokens(model: nn.Module, tokenizer: Any) -> set[int]:
    """The tokens that end a text."""
    found: set[int] = set()
    for owner in (getattr(model, "generation_config", None), getattr(model, "config", None), tokenizer):
        value = getattr(owner, "eos_token_id", None)
        found |= set(value) if isinstance(value, list | tuple) else {value} if isinstance(value, int) else set()
    return found
