"""Who is stepped when: a bounded queue in front of a bounded number of slots, in a thread of its own.

    loop:  drop what nobody waits for  ->  read one waiting prompt, if a slot is free  ->  step all that is active, `Batch.rows` at a time

What is active is also stepped between the pieces of a long prompt (`Batch.read`). So a new request waits for at most one step and the rest of one
prompt, and the active ones for at most one piece between two of their tokens; first come, first served. What is drawn for a sequence comes from a
generator of its own, so its text does not depend on the company.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Listed
from dataclasses import dataclass, field
from typing import Any

import torch

from dither.errors import DitherError
from dither.quant.linear import decoded
from dither.serve.batch import Batch
from dither.serve.metrics import Metrics
from dither.serve.sequence import Piece, Sequence


class Full(DitherError):
    """The queue has no room; to be tried again later."""


class Closed(DitherError):
    """The scheduler takes nothing any more."""


class Left(Exception):
    """Nobody waits for the prompt that is being read."""


@dataclass(eq=False)
class Ticket:
    """A request in the house. ``listener`` is called with pieces, or with the exception that ended the request, from the scheduler's thread."""

    sequences: Listed[Sequence]
    listener: Any
    cancelled: bool = False
    arrived: float = field(default_factory=time.perf_counter)
    first: float | None = None  # when its first token was there
    read: dict[tuple[int, ...], tuple[Any, torch.Tensor]] = field(default_factory=dict)  # prompts that more of its sequences share


Event = tuple[Ticket, Piece | Exception]
Notify = Callable[[list[Event]], None]  # is given what a step brought, all at once


class Scheduler:
    """``slots``: sequences stepped together; ``queue``: sequences that may wait. ``start`` it, ``submit`` from any thread, ``close`` it."""

    def __init__(self, batch: Batch[Any], notify: Notify, metrics: Metrics, *, slots: int = 8, queue: int = 64) -> None:
        if slots < 1:
            raise ValueError(f"slots: must be at least 1, not {slots}")
        if queue < 0:
            raise ValueError(f"queue: must be 0 or more, not {queue}")
        self.batch, self.notify, self.metrics, self.slots, self.queue = batch, notify, metrics, slots, queue
        self.inside: dict[Sequence, Ticket] = {}  # waiting, being read, or active
        self.waiting: deque[tuple[Ticket, Sequence]] = deque()
        self.active: list[tuple[Ticket, Sequence, int]] = []  # with the token that comes next; only the thread touches it
        self.closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="dither-scheduler", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self.closed

    def submit(self, ticket: Ticket) -> None:
        """Raises Full where there is no room for all of its sequences, Closed after `close`."""
        with self._changed:
            if self.closed:
                raise Closed("the server is shutting down")
            if len(self.inside) + len(ticket.sequences) > self.slots + self.queue:
                raise Full(f"{len(self.inside)} texts are being made or wait, and {self.slots + self.queue} is the most; try again later")
            self.inside |= dict.fromkeys(ticket.sequences, ticket)
            self.waiting += [(ticket, sequence) for sequence in ticket.sequences]
            self._measure()
            self._changed.notify()

    def cancel(self, ticket: Ticket) -> None:
        """Nobody waits for it any more: its place in the queue is free at once, its slots after the running step."""
        ticket.cancelled = True
        with self._changed:
            self._drop_cancelled()
            self._changed.notify()

    def close(self, reason: str = "the server is shutting down") -> None:
        """End all requests with `Closed`, and the thread after its running step."""
        with self._changed:
            if self.closed:
                return
            self.closed = True
            tickets = {id(t): t for t in self.inside.values()}.values()
            self.waiting.clear()
            self.inside.clear()
            self._changed.notify()
        self.notify([(ticket, Closed(reason)) for ticket in tickets])

    def join(self, seconds: float) -> bool:
        """Whether the thread has ended within that time."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    # -- the thread

    def _run(self) -> None:
        try:
            with torch.inference_mode(), decoded(self.batch.model, few_rows=True):
                while (found := self._next()) is not None:
                    if found:
                        self._admit(*found[0])
                    if self.active:
                        self._step()
        finally:
            self.close("the server's scheduler has failed")  # does nothing where it was closed

    def _next(self) -> list[tuple[Ticket, Sequence]] | None:
        """The sequence to read now, if any; waits while there is nothing to do. None: the end."""
        with self._changed:
            self._drop_cancelled()
            self._drop_inactive()
            self._measure()
            while not (self.closed or self.waiting or self.active):
                self._changed.wait()
            if self.closed:
                self.active = []
                return None
            return [self.waiting.popleft()] if self.waiting and len(self.active) < self.slots else []

    def _drop_cancelled(self) -> None:
        for ticket, sequence in self.waiting:
            if ticket.cancelled:
                self.inside.pop(sequence, None)
        self.waiting = deque(entry for entry in self.waiting if not entry[0].cancelled)

    def _drop_inactive(self) -> None:
        for ticket, sequence, _ in self.active:
            if ticket.cancelled:
                self.inside.pop(sequence, None)
        self.active = [entry for entry in self.active if not entry[0].cancelled]

    def _measure(self) -> None:
        self.metrics.waiting.set(len(self.waiting))
        self.metrics.active.set(len(self.inside) - len(self.waiting))

    def _admit(self, ticket: Ticket, sequence: Sequence) -> None:
        try:
            logits = self._read(ticket, sequence)
            events: list[Event] = []
            self._take(ticket, sequence, logits, events)
            self._tell(events)
        except Left:
            self.inside.pop(sequence, None)
        except Exception as error:
            self._fail([ticket], error)

    def _read(self, ticket: Ticket, sequence: Sequence) -> torch.Tensor:
        """Scores of the first token; choices of one prompt read it once."""
        key = sequence.prompt
        shared = sum(s.prompt == key and s.state is None for s in ticket.sequences) > 1
        if key in ticket.read:
            state, logits = ticket.read[key]
            sequence.state = state.copy()
            return logits
        started, stepped = time.perf_counter(), 0.0

        def between() -> None:
            nonlocal stepped
            paused = time.perf_counter()
            self._between(ticket)
            stepped += time.perf_counter() - paused

        sequence.state, logits = self.batch.read(sequence.prompt, between)
        self.metrics.prompt_tokens.inc(len(sequence.prompt))
        self.metrics.read_seconds.observe(time.perf_counter() - started - stepped)
        if shared:
            ticket.read[key] = sequence.state.copy(), logits.clone()
        return logits

    def _between(self, reading: Ticket) -> None:
        """Two pieces of its prompt. Raises Left where it is not worth going on."""
        if self.active:
            self._step()
        with self._changed:
            self._drop_cancelled()
            self._drop_inactive()
            self._measure()
            if self.closed or reading.cancelled:
                raise Left

    def _step(self) -> None:
        events: list[Event] = []
        entries, self.active = self.active, []
        for at in range(0, len(entries), self.batch.rows):
            chosen = entries[at : at + self.batch.rows]
            started = time.perf_counter()
            try:
                rows = self.batch.step([s.state for _, s, _ in chosen], [token for *_, token in chosen])
            except Exception as error:  # no sequence of these has a state to go on from
                self._fail([ticket for ticket, *_ in chosen], error)
                continue
            self.metrics.step_seconds.observe(time.perf_counter() - started)
            self.metrics.rows.inc(len(chosen))
            for (ticket, sequence, _), logits in zip(chosen, rows, strict=True):
                try:
                    self._take(ticket, sequence, logits, events)
                except ValueError as error:
                    self._fail([ticket], error)
        self._tell(events)

    def _take(self, ticket: Ticket, sequence: Sequence, logits: torch.Tensor, events: list[Event]) -> None:
        if ticket.cancelled:
            self.inside.pop(sequence, None)
            return
        made = sequence.made
        token, piece = sequence.take(logits)
        self.metrics.tokens.inc(sequence.made - made)
        if ticket.first is None:
            ticket.first = time.perf_counter()
            self.metrics.first_seconds.observe(ticket.first - ticket.arrived)
        if piece is not None:
            events.append((ticket, piece))
        if piece is not None and piece.finish is not None:
            sequence.state = None
            self.inside.pop(sequence, None)
        else:
            self.active.append((ticket, sequence, token))

    def _tell(self, events: list[Event]) -> None:
        if events and not self.closed:
            self.notify(events)

    def _fail(self, tickets: list[Ticket], error: Exception) -> None:
        self.metrics.failures.inc(len({id(t) for t in tickets}))
        for ticket in tickets:
            ticket.cancelled = True
            for sequence in ticket.sequences:
                self.inside.pop(sequence, None)
        self._tell([(ticket, error) for ticket in {id(t): t for t in tickets}.values()])
