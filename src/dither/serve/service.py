"""A model behind the routes: what it is called, what it can take, and how a request becomes sequences."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence as Listed
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dither.errors import ModelError, UsageError
from dither.quant.prompts import encode, encode_chat, has_chat_template
from dither.quant.sampling import Sampling
from dither.quant.stepping import end_tokens, positions
from dither.serve.errors import ApiError
from dither.serve.metrics import Metrics
from dither.serve.scheduler import Event, Scheduler
from dither.serve.schemas import Ask, ChatAsk, CompletionAsk
from dither.serve.sequence import Sequence
from dither.serve.token_text import TokenText
from dither.serve.trial import stepper


@dataclass(frozen=True, kw_only=True)
class Limits:
    """``slots``: texts made at once; ``queue``: texts that may wait; ``max_tokens``: new tokens of a text; ``context``: tokens of prompt and text
    together (None: the model's positions); ``max_body``: bytes of a request; ``body_seconds``: for a client to send it.
    Raises ValueError out of range."""

    slots: int = 8
    queue: int = 64
    max_tokens: int = 1024
    context: int | None = None
    max_body: int = 4 << 20
    body_seconds: float = 30.0

    def __post_init__(self) -> None:
        for name in ("slots", "max_tokens", "context", "max_body"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: must be at least 1, not {value}")
        if self.queue < 0:
            raise ValueError(f"queue: must be 0 or more, not {self.queue}")
        if not self.body_seconds > 0:
            raise ValueError(f"body_seconds: must be more than 0, not {self.body_seconds}")


class Service:
    """Raises ModelError where ``model`` is no language model or has no tokenizer. `start` and `close` it in the event loop that serves."""

    def __init__(self, model: nn.Module, tokenizer: Any, name: str, limits: Limits | None = None) -> None:
        if tokenizer is None:
            raise ModelError("the model comes without a tokenizer, so it cannot read a prompt; copy tokenizer.json into its folder")
        self.tokenizer, self.name, self.limits = tokenizer, name, limits or Limits()
        self.metrics, self.tokens, self.created = Metrics(), TokenText(tokenizer), int(time.time())
        self.fingerprint = f"fp_{secrets.token_hex(5)}"
        self.batch = stepper(model)
        with torch.inference_mode():
            self.vocabulary = self.batch.read([0])[1].shape[0]
        most = [n for n in (positions(model), self.limits.context) if n is not None]
        self.context = min(most, default=1 << 20)
        self.ends = frozenset(end_tokens(model, tokenizer))
        self.scheduler = Scheduler(self.batch, self._notify, self.metrics, slots=self.limits.slots, queue=self.limits.queue)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._encoder = ThreadPoolExecutor(1, "dither-tokenizer")  # one: tokenizers are not made for several threads

    def start(self) -> None:
        """In the event loop that answers."""
        self._loop = asyncio.get_running_loop()
        self.scheduler.start()

    def close(self) -> None:
        """End all texts."""
        self.scheduler.close()
        self._encoder.shutdown(wait=False, cancel_futures=True)

    def _notify(self, events: list[Event]) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_deliver, events)

    async def sequences(self, ask: Ask) -> list[Sequence]:
        """``n`` for each prompt. Raises ApiError where the request does not fit the model."""
        if ask.model != self.name:
            raise ApiError(404, f"the model {ask.model[:100]!r} is not served here; {self.name!r} is", param="model", code="model_not_found")
        unknown = [token for token in ask.logit_bias if token >= self.vocabulary]
        if unknown:
            raise ApiError(400, f"logit_bias: token {unknown[0]} is none of the model's {self.vocabulary}", param="logit_bias")
        chat = isinstance(ask, ChatAsk)
        prompts = await asyncio.get_running_loop().run_in_executor(self._encoder, self._encoded, ask)
        top = self.top(ask)
        seed = secrets.randbits(62) if ask.seed is None else ask.seed
        found: list[Sequence] = []
        for ids in prompts:
            room = self._room(len(ids), ask, "messages" if chat else "prompt")
            for _ in range(ask.n):
                sampling = Sampling(
                    max_tokens=room, temperature=ask.temperature, top_p=ask.top_p, top_k=ask.top_k, seed=seed + len(found) % ask.n,
                    stop=tuple(ask.stop), presence_penalty=ask.presence_penalty, frequency_penalty=ask.frequency_penalty, bias=ask.logit_bias,
                )  # fmt: skip
                found.append(Sequence(len(found), ids, sampling, self.tokenizer, self.ends, top))
        most = self.limits.slots + self.limits.queue
        if len(found) > most:
            raise ApiError(400, f"n: {len(found)} texts are more than the {most} that the server takes at all", param="n")
        return found

    def top(self, ask: Ask) -> int | None:
        """Likeliest tokens to name beside each token; None: no log-probabilities."""
        if isinstance(ask, ChatAsk):
            return (ask.top_logprobs or 0) if ask.logprobs else None
        assert isinstance(ask, CompletionAsk)
        return ask.logprobs

    def _encoded(self, ask: Ask) -> Listed[tuple[int, ...]]:
        if isinstance(ask, ChatAsk):
            if not has_chat_template(self.tokenizer):
                raise ApiError(400, "the model has no chat template; use /v1/completions", param="messages")
            try:
                return [tuple(encode_chat(self.tokenizer, [m.plain() for m in ask.messages]))]
            except UsageError as error:
                raise ApiError(400, str(error), param="messages") from None
        assert isinstance(ask, CompletionAsk)
        try:
            return [tuple(encode(self.tokenizer, p) if isinstance(p, str) else self._known(p)) for p in ask.prompts()]
        except ValueError as error:  # UsageError is one
            raise ApiError(400, str(error), param="prompt") from None

    def _known(self, ids: list[int]) -> list[int]:
        if not ids:
            raise ValueError("prompt: is empty")
        if max(ids) >= self.vocabulary:
            raise ValueError(f"prompt: token {max(ids)} is none of the model's {self.vocabulary}")
        return ids

    def _room(self, prompt: int, ask: Ask, param: str) -> int:
        """New tokens that a prompt of so many may have."""
        if isinstance(ask, ChatAsk):
            name, wanted = "max_completion_tokens", ask.max_completion_tokens
            if wanted is None:
                name, wanted = "max_tokens", ask.max_tokens
        else:
            assert isinstance(ask, CompletionAsk)
            name, wanted = "max_tokens", ask.max_tokens
        if wanted is not None and wanted > self.limits.max_tokens:
            raise ApiError(400, f"{name}: must be at most {self.limits.max_tokens} on this server, not {wanted}", param=name)
        left = self.context - prompt
        if left < (wanted or 1):
            message = f"the prompt has {prompt} tokens, and with {wanted or 1} new ones that is more than the {self.context} that fit"
            raise ApiError(400, message, param=param, code="context_length_exceeded")
        return wanted or min(left, self.limits.max_tokens)


def _deliver(events: list[Event]) -> None:
    for ticket, event in events:
        ticket.listener(event)


