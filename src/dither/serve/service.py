"""A model behind the routes: what it is called, what it can take, its scheduler and what is counted."""

from __future__ import annotations

import asyncio
import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dither.errors import ModelError
from dither.quant.stepping import end_tokens, positions
from dither.serve.errors import ApiError
from dither.serve.intake import Intake
from dither.serve.metrics import Metrics
from dither.serve.scheduler import Event, Scheduler
from dither.serve.schemas import Ask
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
            vocabulary = self.batch.read([0])[1].shape[0]
        self.context = min((n for n in (positions(model), self.limits.context) if n is not None), default=1 << 20)
        most = self.limits.slots + self.limits.queue
        ends = frozenset(end_tokens(model, tokenizer))
        self.intake = Intake(tokenizer, ends, vocabulary, context=self.context, max_tokens=self.limits.max_tokens, most=most)
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
            raise self.not_served(ask.model)
        if self.scheduler.closed:
            raise ApiError(503, "the server is shutting down", code="shutting_down")
        return await asyncio.get_running_loop().run_in_executor(self._encoder, self.intake.sequences, ask)

    def not_served(self, name: str) -> ApiError:
        return ApiError(404, f"the model {name[:100]!r} is not served here; {self.name!r} is", param="model", code="model_not_found")


def _deliver(events: list[Event]) -> None:
    for ticket, event in events:
        ticket.listener(event)


