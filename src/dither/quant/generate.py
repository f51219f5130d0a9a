"""Generates text token by token, with the sampling options everybody has: temperature, top-k, top-p, stop strings, seed."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dither.errors import ModelError, UsageError
from dither.quant.linear import decoded

_CONTEXT = 5  # tokens of the prompt that are decoded along, so that the first new token keeps its leading space
_BROKEN = "�"  # what a tokenizer shows for half a character


@dataclass(frozen=True)
class Sampling:
    """``temperature`` 0 takes the likeliest token; ``top_k`` 0 and ``top_p`` 1 keep all tokens. Raises ValueError out of range."""

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens: must be at least 1, not {self.max_tokens}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature: must be 0 or more, not {self.temperature}")
        if not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p: must be 0 to 1, not {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k: must be 0 or more, not {self.top_k}")
        if isinstance(self.stop, str) or not all(self.stop):
            raise ValueError(f"stop: must be strings that are not empty, not {self.stop!r}")


@dataclass(frozen=True)
class Generation:
    """``stopped_by``: "end" (the model's end token), "stop" (a stop string) or "length". ``seconds`` includes reading the prompt."""

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

    Few-bit layers that do not multiply codes (`linear.QuantWeight.multiplies_codes`) keep decoded weights meanwhile, as far as memory allows.

    Raises UsageError where the prompt is empty or does not fit the model, or ``chat`` is asked of a tokenizer without a template;
    ModelError where the model is no language model or has no tokenizer; ValueError where its output is not finite.
    """
    ids = _encode(tokenizer, prompt, chat).to(next(model.parameters()).device)
    limit = positions(model)
    if limit is not None and ids.shape[1] + sampling.max_tokens > limit:
        raise UsageError(
            f"prompt: has {ids.shape[1]} tokens, and with {sampling.max_tokens} new ones that is more than the model's {limit} positions; "
            "shorten the prompt or lower --max-tokens"
        )
    ends, context = _end_tokens(model, tokenizer), ids[0, -_CONTEXT:].tolist()
    before = tokenizer.decode(context, skip_special_tokens=True)
    generator = torch.Generator().manual_seed(sampling.seed)
    hold = max((len(s) - 1 for s in sampling.stop), default=0)  # characters that may yet become a stop string
    made: list[int] = []
    text, shown, stopped_by, started = "", 0, "length", time.perf_counter()
    with decoded(model, few_rows=True):
        step = _Stepper(model, ids)
        for _ in range(sampling.max_tokens):
            token = pick(step.logits(), sampling, generator)
            if token in ends:
                stopped_by = "end"
                break
            made.append(token)
            step.append(token)
            text = tokenizer.decode([*context, *made], skip_special_tokens=True)[len(before) :]
            found = min((at for s in sampling.stop if (at := text.find(s)) >= 0), default=-1)
            if found >= 0:
                text, stopped_by = text[:found], "stop"
                break
            certain = shown if text.endswith(_BROKEN) else len(text) - hold
            if on_text is not None and certain > shown:
                on_text(text[shown:certain])
                shown = certain
    if on_text is not None and len(text) > shown:
        on_text(text[shown:])
    return Generation(text, len(made), ids.shape[1], stopped_by, time.perf_counter() - started)


class _Stepper:
    """The model one token at a time: by its key-value cache where it has one, else by reading everything again."""

    def __init__(self, model: nn.Module, ids: Tensor) -> None:
        self.model, self.ids, self.cache = model, ids, None
        accepts = inspect.signature(model.forward).parameters
        self.cached = "past_key_values" in accepts
        self.options: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in accepts else {}

    def logits(self) -> Tensor:
        """Of the next token, ``[V]`` float32, on the CPU."""
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
        new = torch.tensor([[token]], device=self.ids.device)
        self.ids = new if self.cached else torch.cat([self.ids, new], dim=1)


def pick(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token from ``logits [V]``. Raises ValueError where they hold NaN."""
    if bool(logits.isnan().any()):
        raise ValueError("the model's output is not finite")
    if sampling.temperature == 0:
        return int(logits.argmax())
    scaled = (
        logits - logits.max()
    ) / sampling.temperature  # the largest is 0: nothing overflows, however low the temperature
    if 0 < sampling.top_k < scaled.shape[0]:
        scaled[scaled < scaled.topk(sampling.top_k).values[-1]] = -torch.inf
    p = scaled.softmax(-1)
    if sampling.top_p < 1:
        ordered, order = p.sort(descending=True, stable=True)
        beyond = ordered.cumsum(0) - ordered >= sampling.top_p  # the likelier ones already hold top_p
        beyond[0] = False
        p[order[beyond]] = 0
    return int(torch.multinomial(p, 1, generator=generator))


def positions(model: nn.Module) -> int | None:
    """How many tokens the model can place; None where it does not say."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit = getattr(text, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def _encode(tokenizer: Any, prompt: str, chat: bool) -> Tensor:
    """Token ids ``[1, N]``."""
    if tokenizer is None:
        raise ModelError(
            "the model comes without a tokenizer, so it cannot read a prompt; copy tokenizer.json into its folder"
        )
    if not prompt:
        raise UsageError("the prompt is empty")
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise UsageError("--chat: the model's tokenizer has no chat template")
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
    ids = tokenizer(prompt, add_special_tokens=not chat)["input_ids"]
    if not ids:
        raise UsageError(f"the prompt {prompt!r} has no tokens")
    return torch.tensor([ids])


def _end_tokens(model: nn.Module, tokenizer: Any) -> set[int]:
    found: set[int] = set()
    for owner in (getattr(model, "generation_config", None), getattr(model, "config", None), tokenizer):
        value = getattr(owner, "eos_token_id", None)
        found |= set(value) if isinstance(value, list | tuple) else {value} if isinstance(value, int) else set()
    return found
