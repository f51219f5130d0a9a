"""A server of a tiny model on a free port of this machine, in a thread, for as long as a block lasts."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import tiny_folder
import tiny_models
from dither.serve.server import Server, bind
from dither.serve.service import Limits, Service

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}>>{% endif %}"
NAME = "tiny"


def model(name: str = "llama", *, positions: int | None = 512) -> Any:
    """A random model that never ends a text by itself, with room for longer ones."""
    found, _ = tiny_models.build(name)
    for parameter in found.parameters():
        parameter.data *= 2
    found.generation_config.eos_token_id = found.config.eos_token_id = None
    if positions is not None:
        found.config.max_position_embeddings = positions
    return found


def tokenizer() -> Any:
    made = tiny_folder.tokenizer()
    made.chat_template = TEMPLATE
    made.eos_token = None
    return made


class Live:
    """``url`` ends in /v1."""

    def __init__(self, server: Server, thread: threading.Thread) -> None:
        self.server, self.thread, self.service = server, thread, server.service
        self.port: int = server.bound.getsockname()[1]
        self.root = f"http://127.0.0.1:{self.port}"
        self.url = f"{self.root}/v1"

    def settled(self, seconds: float = 10.0) -> bool:
        """Whether nothing is left in the house within that time."""
        return until(lambda: not self.service.scheduler.inside, seconds)

    def metric(self, name: str, **labels: str) -> float:
        return self.service.metrics.registry.get_sample_value(name, labels) or 0.0


def until(true: Any, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


@contextmanager
def live(net: Any = None, limits: Limits | None = None, *, api_key: str | None = None, tokens: Any = None) -> Iterator[Live]:
    ready = threading.Event()
    service = Service(net if net is not None else model(), tokens or tokenizer(), NAME, limits)
    server = Server(service, bind("127.0.0.1", 0), api_key=api_key, ready=ready.set)
    thread = threading.Thread(target=server.serve_until_stopped, daemon=True)
    thread.start()
    assert ready.wait(30), "the server did not start"
    found = Live(server, thread)
    try:
        yield found
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the server did not end"
