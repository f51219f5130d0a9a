"""Generates text token by token, with the sampling options everybody has: temperature, top-k, top-p, stop strings, seed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dither.errors import UsageError
from dither.quant.attention import cheap_attention
from dither.quant.linear import decoded
from dither.quant.program.stepper import ProgramStepper
from dither.quant.prompts import encode, encode_chat, has_chat_template
from dither.quant.sampling import Chooser, Sampling, pick
from dither.quant.stepping import end_tokens, positions
from dither.quant.text_stream import TextStream

__all__ = ["Generation", "Sampling", "generate", "pick"]


@dataclass(frozen=True)
class Generation:
    """``stopped_by``: "end" (the model's end token), "stop" (a stop string) or "length". ``seconds`` includes ``prompt_seconds``, until the scores of
    the first token were there."""

    text: str
    tokens: int
    prompt_tokens: int
    stopped_by: str
    seconds: float
    prompt_seconds: float = 0.0

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
    ids = _encode(tokenizer, prompt, chat)
    limit = positions(model)
    if limit is not None and len(ids) + sampling.max_tokens > limit:
        raise UsageError(
            f"prompt: has {len(ids)} tokens, and with {sampling.max_tokens} new ones that is more than the model's {limit} positions; "
            "shorten the prompt or lower --max-tokens"
        )
    ends, stream = end_tokens(model, tokenizer), TextStream(tokenizer, ids, sampling.stop)
    chooser, tokens, stopped_by, started = Chooser(sampling), 0, "length", time.perf_counter()
    show = on_text or (lambda piece: None)
    with decoded(model, few_rows=True):
        step = ProgramStepper(model, torch.tensor([ids], device=next(model.parameters()).device), sampling.max_tokens)
        with cheap_attention():
            scores = step.logits()
        read = time.perf_counter()
        for made in range(sampling.max_tokens):
            token = chooser.choose(step.logits() if made else scores)
            if token in ends:
                stopped_by = "end"
                break
            tokens += 1
            step.append(token)
            if piece := stream.push(token):
                show(piece)
            if stream.stopped:
                stopped_by = "stop"
                break
    if piece := stream.rest():
        show(piece)
    return Generation(stream.text, tokens, len(ids), stopped_by, time.perf_counter() - started, read - started)


def _encode(tokenizer: Any, prompt: str, chat: bool) -> list[int]:
    if not chat or tokenizer is None or not prompt:
        return encode(tokenizer, prompt)
    if not has_chat_template(tokenizer):
        raise UsageError("--chat: the model's tokenizer has no chat template")
    return encode_chat(tokenizer, [{"role": "user", "content": prompt}])
