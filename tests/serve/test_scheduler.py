"""Admission, order and cancelling, with a batch that is played by hand."""

from __future__ import annotations

import threading
from collections.abc import Callable
from collections.abc import Sequence as Listed
from typing import Any

import pytest
import torch

import live_server
from dither.quant.sampling import Sampling
from dither.serve.metrics import Metrics
from dither.serve.scheduler import Closed, Event, Full, Scheduler, Ticket
from dither.serve.sequence import Sequence
from live_server import until

TOKENIZER = live_server.tokenizer()


class State:
    def __init__(self, prompt: tuple[int, ...]) -> None:
        self.prompt = prompt

    def copy(self) -> State:
        return State(self.prompt)


class Played:
    """Says token 5 forever. ``log``: prompts read and steps' prompts, in order. Each call waits for ``go``; a token of a prompt is a piece."""

    rows = 2
    model = torch.nn.Linear(1, 1)

    def __init__(self) -> None:
        self.log: list[tuple[str, Any]] = []
        self.go = threading.Semaphore(0)

    def read(self, prompt: tuple[int, ...], between: Callable[[], None]) -> tuple[State, torch.Tensor]:
        for piece in range(len(prompt)):
            if piece:
                between()
            self.go.acquire()
            self.log.append(("read", prompt))
        return State(prompt), torch.eye(9)[5]

    def step(self, states: Listed[State], tokens: Listed[int]) -> list[torch.Tensor]:
        self.go.acquire()
        self.log.append(("step", [s.prompt[0] for s in states]))
        return [torch.eye(9)[5] for _ in states]


class House:
    def __init__(self, **limits: int) -> None:
        self.batch, self.events, self.metrics = Played(), list[Event](), Metrics()
        self.scheduler = Scheduler(self.batch, self.events.extend, self.metrics, **limits)  # type: ignore[arg-type]
        self.scheduler.start()

    def ask(self, name: int, tokens: int, n: int = 1, pieces: int = 1) -> Ticket:
        made = [Sequence(i, (name,) * pieces, Sampling(max_tokens=tokens), TOKENIZER) for i in range(n)]
        ticket = Ticket(made, None)
        self.scheduler.submit(ticket)
        return ticket

    def run(self, calls: int) -> list[tuple[str, Any]]:
        """So many calls of the model; what they were."""
        before = len(self.batch.log)
        self.batch.go.release(calls)
        assert until(lambda: len(self.batch.log) == before + calls), self.batch.log
        return self.batch.log[before:]


def ended(house: House, ticket: Ticket) -> bool:
    return until(lambda: any(t is ticket and getattr(e, "finish", None) for t, e in house.events))


def test_one_prompt_between_two_steps_and_first_come_first_served() -> None:
    house = House(slots=2, queue=9)
    tickets = [house.ask(1, 4), house.ask(2, 3), house.ask(3, 2)]
    calls = [("read", (1,)), ("step", [1]), ("read", (2,)), ("step", [1, 2]), ("step", [1, 2]), ("read", (3,)), ("step", [3])]
    assert house.run(7) == calls
    assert all(ended(house, t) for t in tickets) and until(lambda: not house.scheduler.inside)
    assert house.metrics.registry.get_sample_value("dither_generated_tokens_total") == 4 + 3 + 2
    house.scheduler.close()


def test_what_is_active_is_stepped_between_the_pieces_of_a_prompt() -> None:
    house = House(slots=3, queue=9)
    house.ask(1, 6)
    house.run(1)
    long = house.ask(2, 2, pieces=3)
    house.ask(3, 3)
    step, piece = ("step", [1]), ("read", (2, 2, 2))
    assert house.run(8) == [step, piece, step, piece, step, piece, ("step", [1, 2]), ("read", (3,))]
    assert ended(house, long)
    house.scheduler.close()
    house.batch.go.release(9)
    assert house.scheduler.join(10)


def test_a_prompt_that_nobody_waits_for_is_not_read_to_its_end() -> None:
    house = House(slots=2, queue=9)
    house.ask(1, 5)
    house.run(1)
    left = house.ask(2, 5, pieces=9)
    house.run(2)  # a step and a piece; the next step waits
    house.scheduler.cancel(left)
    assert house.run(3) == [("step", [1])] * 3
    assert until(lambda: not house.scheduler.inside) and house.metrics.registry.get_sample_value("dither_failures_total") == 0
    house.ask(3, 50, pieces=2)
    house.run(1)
    house.scheduler.close()  # also in the middle of one
    house.batch.go.release(9)
    assert house.scheduler.join(10) and len(house.batch.log) <= 9  # a piece and a step at the most


def test_more_slots_than_rows_step_in_turn() -> None:
    house = House(slots=3, queue=0)
    for name in (1, 2, 3):
        house.ask(name, 9)
    assert house.run(7)[-3:] == [("read", (3,)), ("step", [1, 2]), ("step", [3])]
    house.scheduler.close()
    house.batch.go.release(9)
    assert house.scheduler.join(10)


def test_choices_of_a_prompt_read_it_once() -> None:
    house = House(slots=4, queue=0)
    ticket = house.ask(1, 3, n=3)
    house.batch.go.release(99)
    assert until(lambda: sum(getattr(e, "finish", None) == "length" for _, e in house.events) == 3)
    assert [kind for kind, _ in house.batch.log].count("read") == 1 and {id(t) for t, _ in house.events} == {id(ticket)}
    house.scheduler.close()


def test_the_house_is_never_overfull() -> None:
    house = House(slots=2, queue=1)
    tickets = [house.ask(1, 50), house.ask(2, 50)]
    house.run(3)  # both are active, one is in the middle of a step
    tickets.append(house.ask(3, 50))
    with pytest.raises(Full, match="3 texts are being made or wait, and 3 is the most"):
        house.ask(4, 1)
    house.scheduler.cancel(tickets[2])  # a waiting one leaves at once
    tickets[2] = house.ask(4, 50)
    with pytest.raises(Full):
        house.ask(5, 1)
    house.scheduler.cancel(tickets[0])  # an active one after the running step, whose place the next then takes
    assert house.run(3)[1:] == [("read", (4,)), ("step", [2, 4])]
    house.ask(5, 1)
    house.scheduler.close()
    house.batch.go.release(9)
    assert house.scheduler.join(10)


def test_closing_ends_all_and_takes_nothing() -> None:
    house = House(slots=1, queue=5)
    tickets = [house.ask(1, 50), house.ask(2, 50, n=2)]
    house.run(2)
    house.scheduler.close()
    ends = [(t, e) for t, e in house.events if isinstance(e, Closed)]
    assert {id(t) for t, _ in ends} == {id(t) for t in tickets} and len(ends) == 2 and not house.scheduler.inside
    house.batch.go.release(9)
    assert house.scheduler.join(10) and not house.scheduler.alive
    with pytest.raises(Closed, match="shutting down"):
        house.ask(3, 1)


def test_a_failing_step_ends_the_requests_in_it() -> None:
    house = House(slots=2, queue=5)
    bad = house.ask(1, 50)
    house.run(1)
    house.batch.step = lambda *a: 1 / 0  # type: ignore[assignment, return-value]
    house.batch.go.release(1)  # the step that has begun
    assert until(lambda: any(isinstance(e, ZeroDivisionError) and t is bad for t, e in house.events))
    del house.batch.step
    good = house.ask(2, 2)
    house.batch.go.release(9)
    assert ended(house, good) and house.scheduler.alive and until(lambda: not house.scheduler.inside)
    house.scheduler.close()


@pytest.mark.parametrize(("limits", "words"), [({"slots": 0}, "slots: must be at least 1"), ({"queue": -1}, "queue: must be 0 or more")])
def test_limits_out_of_range(limits: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Scheduler(Played(), lambda events: None, Metrics(), **limits)  # type: ignore[arg-type]
