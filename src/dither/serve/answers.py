"""A request's texts on their way to a client: whole as JSON, or piece by piece as server-sent events. A client that leaves frees its slots."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dither.serve.errors import ApiError
from dither.serve.forms import Form
from dither.serve.scheduler import Closed, Full, Ticket
from dither.serve.schemas import Answer, Ask, Usage
from dither.serve.sequence import Piece, Score, Sequence
from dither.serve.service import Service


class _Gone(Exception):
    """The client has left."""


class Texts(Response):
    """Submits ``sequences`` when it is sent, and cancels what is left of them when that ends, however it ends."""

    def __init__(self, service: Service, form: Form, ask: Ask, sequences: list[Sequence]) -> None:
        super().__init__()
        self.service, self.form, self.ask, self.sequences = service, form, ask, sequences
        self.id, self.created = form.prefix + secrets.token_hex(12), int(time.time())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        events: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        ticket = Ticket(self.sequences, events.put_nowait)
        try:
            self.service.scheduler.submit(ticket)
        except Full as error:
            raise ApiError(429, str(error), code="rate_limit_exceeded", headers={"retry-after": "1"}) from None
        except Closed as error:
            raise _unavailable(error) from None
        watch = asyncio.ensure_future(_until_gone(receive, events))
        try:
            await (self._stream if self.ask.stream else self._whole)(self._pieces(events), send)
        except _Gone:
            self.service.metrics.disconnects.inc()
        finally:
            watch.cancel()
            self.service.scheduler.cancel(ticket)

    async def _pieces(self, events: asyncio.Queue[Piece | Exception]) -> AsyncIterator[Piece]:
        left = len(self.sequences)
        while left:
            event = await events.get()
            if isinstance(event, Exception):
                raise event
            left -= event.finish is not None
            yield event

    async def _whole(self, pieces: AsyncIterator[Piece], send: Send) -> None:
        texts: list[list[str]] = [[] for _ in self.sequences]
        scores: list[list[Score]] = [[] for _ in self.sequences]
        finish: list[str | None] = [None for _ in self.sequences]
        made = 0
        try:
            async for piece in pieces:
                texts[piece.index].append(piece.text)
                scores[piece.index] += piece.scores
                finish[piece.index] = piece.finish
                made += piece.tokens
        except _Gone:
            raise
        except Exception as error:
            raise _failure(error) from error
        choices = [self.form.choice(i, "".join(t), tuple(scores[i]), finish[i]) for i, t in enumerate(texts)]
        body = self._answer(self.form.whole, choices, self._usage(made)).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _stream(self, pieces: AsyncIterator[Piece], send: Send) -> None:
        """The first event decides the status: what fails before it fails with a status of its own."""
        begun, made = False, 0
        options = self.ask.stream_options
        try:
            async for piece in pieces:
                made += piece.tokens
                if not begun:
                    begun = True
                    headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
                    await send({"type": "http.response.start", "status": 200, "headers": headers})
                await _say(send, *(self._answer(self.form.chunk, [choice]) for choice in self.form.part(piece)))
        except _Gone:
            raise
        except Exception as error:
            failure = _failure(error)
            if not begun:
                raise failure from error
            await _say(send, json.dumps(failure.body()))
        else:
            last = [self._answer(self.form.chunk, [], self._usage(made))] if options is not None and options.include_usage else []
            await _say(send, *last, "[DONE]")
        await send({"type": "http.response.body", "body": b""})

    def _usage(self, made: int) -> Usage:
        prompts = sum(len(s.prompt) for s in self.sequences[:: self.ask.n])
        return Usage(prompt_tokens=prompts, completion_tokens=made, total_tokens=prompts + made)

    def _answer(self, kind: str, choices: list[Any], usage: Usage | None = None) -> str:
        service = self.service
        answer = Answer.model_construct(
            id=self.id, object=kind, created=self.created, model=service.name, system_fingerprint=service.fingerprint, choices=choices, usage=usage
        )
        return answer.model_dump_json(exclude=None if usage is not None else {"usage"})


async def _say(send: Send, *events: str) -> None:
    await send({"type": "http.response.body", "body": "".join(f"data: {e}\n\n" for e in events).encode(), "more_body": True})


async def _until_gone(receive: Receive, events: asyncio.Queue[Piece | Exception]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    events.put_nowait(_Gone())


def _unavailable(error: Exception) -> ApiError:
    return ApiError(503, str(error), code="shutting_down")


def _failure(error: Exception) -> ApiError:
    """What a client may know of what went wrong."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Closed):
        return _unavailable(error)
    if isinstance(error, MemoryError | RuntimeError) and "memory" in str(error).lower():
        return ApiError(503, "out of memory; try a shorter prompt, or later", code="out_of_memory")
    return ApiError(500, f"the model failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
