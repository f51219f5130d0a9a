"""Generates text token by token, with the sampling options everybody has: temperature, top-k, top-p, stop strings, seed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dither.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """``temperature`` 0 takes the likeliest token; ``top_k`` 0 and ``top_p`` 1 keep all tokens."""

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Generation:
    """``stopped_by``: "end" (the model's end token), "stop" (a stop string) or "length"."""

    text: str
    tokens: int
    prompt_tokens: int
    stopped_by: str
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


@torch.inference_mode()
def generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: str,
    sampling: Sampling,
    *,
    chat: bool = False,
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Continue ``prompt``. ``on_text`` receives pieces of text as they become certain (a stop string is never shown).

    Raises UsageError where the prompt does not fit the model, or ``chat`` is asked of a tokenizer without a template.
    """
    ids = _encode(tokenizer, prompt, chat)
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and ids.shape[1] + sampling.max_tokens > limit:
        raise UsageError(
            f"prompt of {ids.shape[1]} tokens + {sampling.max_tokens} new ones exceed the model's {limit} positions"
        )
    ends = _end_tokens(model, tokenizer)
    generator = torch.Generator().manual_seed(sampling.seed)
    started = time.perf_counter()
    cache, step, made, shown, text, stopped_by = None, ids, [], 0, "", "length"
    hold = max((len(s) for s in sampling.stop), default=0)
    for _ in range(sampling.max_tokens):
        output = model(input_ids=step, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        token = pick(output.logits[0, -1].float(), sampling, generator)
        if token in ends:
            stopped_by = "end"
            break
        made.append(token)
        step = torch.tensor([[token]])
        text = tokenizer.decode(made, skip_special_tokens=True)
        found = min((at for s in sampling.stop if (at := text.find(s)) >= 0), default=-1)
        if found >= 0:
            text, stopped_by = text[:found], "stop"
            break
        safe = len(text) - hold if not text.endswith("�") else shown  # half a character waits for its other half
        if on_text is not None and safe > shown:
            on_text(text[shown:safe])
            shown = safe
    if on_text is not None and len(text) > shown:
        on_text(text[shown:])
    return Generation(text, len(made), ids.shape[1], stopped_by, time.perf_counter() - started)


def pick(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token from ``logits [V]``."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[0]:
        logits[logits < logits.topk(sampling.top_k).values[-1]] = -torch.inf
    p = logits.softmax(-1)
    if sampling.top_p < 1:
        ordered, order = p.sort(descending=True)
        beyond = ordered.cumsum(0) - ordered > sampling.top_p  # keeps the token that crosses the threshold
        p[order[beyond]] = 0
    return int(torch.multinomial(p, 1, generator=generator))


def _encode(tokenizer: Any, prompt: str, chat: bool) -> Tensor:
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise UsageError("--chat: the model's tokenizer has no chat template")
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
    ids = tokenizer(prompt, add_special_tokens=not chat)["input_ids"]
    if not ids:
        raise UsageError("the prompt has no tokens")
    return torch.tensor([ids])


def _end_tokens(model: nn.Module, tokenizer: Any) -> set[int]:
    found: set[int] = set()
    for owner in (getattr(model, "generation_config", None), getattr(model, "config", None), tokenizer):
        value = getattr(owner, "eos_token_id", None)
        found |= set(value) if isinstance(value, list | tuple) else {value} if isinstance(value, int) else set()
    return found
