"""Prompts to token ids: plain text, or messages put into the chat template that comes with the tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dither.errors import ModelError, UsageError


def encode(tokenizer: Any, prompt: str, *, special: bool = True) -> list[int]:
    """Token ids; ``special``: with those that the tokenizer puts around a text. Raises UsageError where there are none, ModelError without
    a tokenizer."""
    if tokenizer is None:
        raise ModelError(
            "the model comes without a tokenizer, so it cannot read a prompt; copy tokenizer.json into its folder"
        )
    if not prompt:
        raise UsageError("the prompt is empty")
    ids: list[int] = tokenizer(prompt, add_special_tokens=special)["input_ids"]
    if not ids:
        raise UsageError(f"the prompt {prompt[:100]!r} has no tokens")
    return ids


def has_chat_template(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def encode_chat(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """``messages``: each with "role" and "content". Raises UsageError where the template refuses them."""
    from jinja2.exceptions import TemplateError

    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise UsageError(f"the model's chat template refuses the messages: {error}") from None
    return encode(tokenizer, text, special=False)
