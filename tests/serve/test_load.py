"""Many clients at once, clients that leave, queues that are full: slots come free, texts stay what they are alone, nothing is left behind."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import socket
import threading
import time
from typing import Any

import httpx
import openai
import psutil
import pytest
from openai import AsyncOpenAI, OpenAI

import live_server
from dither.quant.generate import Sampling, generate
from dither.serve.server import bind
from dither.serve.service import Limits
from live_server import NAME, Live, until

NET, TOKENIZER = live_server.model(), live_server.tokenizer()


def alone(prompt: str, tokens: int, **options: Any) -> str:
    return generate(NET, TOKENIZER, prompt, Sampling(max_tokens=tokens, **options)).text


async def streamed(client: AsyncOpenAI, prompt: str, tokens: int, **options: Any) -> str:
    stream = await client.completions.create(model=NAME, prompt=prompt, max_tokens=tokens, stream=True, **options)
    return "".join([chunk.choices[0].text async for chunk in stream])


def test_fifty_streams_are_what_each_is_alone(server: Live) -> None:
    draw = random.Random(0)
    asks = [("".join(draw.choices("abc xyz", k=draw.randrange(1, 60))), draw.randrange(1, 60)) for _ in range(50)]

    async def all_at_once() -> list[str]:
        client = AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=60)
        how = [{"temperature": 0} if i % 2 else {"temperature": 1.2, "seed": i} for i in range(50)]
        return await asyncio.gather(*(streamed(client, *ask, **options) for ask, options in zip(asks, how, strict=True)))

    steps = server.metric("dither_step_seconds_count")
    rows = server.metric("dither_step_rows_total")
    found = asyncio.run(all_at_once())
    for i, ((prompt, tokens), text) in enumerate(zip(asks, found, strict=True)):
        assert text == alone(prompt, tokens, **({} if i % 2 else {"temperature": 1.2, "seed": i}))
    assert server.metric("dither_step_rows_total") - rows > 4 * (server.metric("dither_step_seconds_count") - steps)  # they shared steps
    assert server.settled()


def test_a_full_queue_refuses_and_recovers() -> None:
    with live_server.live(limits=Limits(slots=2, queue=3, max_tokens=400)) as small:
        client = OpenAI(base_url=small.url, api_key="none", max_retries=0, timeout=60)
        ask: dict[str, Any] = {"model": NAME, "prompt": "a", "max_tokens": 400}
        streams = [client.completions.create(**ask, stream=True) for _ in range(2)]  # they have begun
        waiting = threading.Thread(target=lambda: client.completions.create(**ask, n=3))
        waiting.start()
        assert until(lambda: len(small.service.scheduler.inside) == 5)
        with pytest.raises(openai.RateLimitError, match="5 texts are being made or wait") as caught:
            client.completions.create(**ask)
        assert caught.value.response.headers["retry-after"] == "1" and caught.value.code == "rate_limit_exceeded"
        with pytest.raises(openai.BadRequestError, match="6 texts are more than the 5 that the server takes at all"):
            client.completions.create(**ask, n=6)
        for stream in streams:
            stream.close()
        waiting.join(60)
        assert not waiting.is_alive() and small.settled()
        assert small.metric("dither_requests_total", path="/v1/completions", status="429") == 1
        assert client.completions.create(**ask).usage.completion_tokens == 400


@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_vanish_free_their_slots(stream: bool) -> None:
    body = json.dumps({"model": NAME, "prompt": "abc", "max_tokens": 50_000, "stream": stream}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with live_server.live(live_server.model(positions=60_000), Limits(slots=2, queue=4, max_tokens=60_000)) as small:
        for _ in range(3):
            gone = [socket.create_connection(("127.0.0.1", small.port)) for _ in range(6)]
            for connection in gone:
                connection.sendall(head + body)
            assert until(lambda: len(small.service.scheduler.inside) == 6)
            for connection in gone:
                connection.close()
            assert small.settled()
        assert small.metric("dither_disconnects_total") == 18
        client = OpenAI(base_url=small.url, api_key="none", max_retries=0)
        assert client.completions.create(model=NAME, prompt="abc", max_tokens=9, temperature=0).choices[0].text == alone("abc", 9)


def test_a_client_that_does_not_read_stops_nobody(server: Live) -> None:
    body = json.dumps({"model": NAME, "prompt": "abc", "max_tokens": 400, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", server.port)) as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        lazy.sendall(head + body)
        client = OpenAI(base_url=server.url, api_key="none", max_retries=0)
        assert client.completions.create(model=NAME, prompt="abc", max_tokens=9, temperature=0).choices[0].text == alone("abc", 9)
    assert server.settled()


def test_a_model_that_fails_fails_its_requests_only(monkeypatch: pytest.MonkeyPatch) -> None:
    net = live_server.model()
    with live_server.live(net) as broken:
        client = OpenAI(base_url=broken.url, api_key="none", max_retries=0)
        ask: dict[str, Any] = {"model": NAME, "prompt": "abc", "max_tokens": 9, "temperature": 0}
        saved = net.lm_head.weight.data.clone()
        net.lm_head.weight.data[:] = float("nan")
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError, match="output is not finite"):
                client.completions.create(**ask, stream=stream)
        assert httpx.get(f"{broken.root}/health").json()["status"] == "ok" and broken.settled()
        net.lm_head.weight.data[:] = saved
        step, calls = broken.service.batch.step, 0

        def fail(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > 3:
                raise RuntimeError("no luck")
            return step(*args)

        with monkeypatch.context() as patched:
            patched.setattr(broken.service.batch, "step", fail)
            with pytest.raises(openai.APIError, match="no luck"):  # in the middle of a stream that has begun
                list(client.completions.create(**ask, stream=True))
        assert client.completions.create(**ask).choices[0].text == alone("abc", 9)
        assert broken.metric("dither_failures_total") == 3 and broken.settled()


def test_shutting_down_ends_streams_cleanly() -> None:
    seen: list[Any] = []
    with live_server.live(live_server.model(positions=60_000), Limits(slots=1, max_tokens=60_000)) as ending:
        client = OpenAI(base_url=ending.url, api_key="none", max_retries=0, timeout=30)

        def follow(stream: bool) -> None:
            try:
                answer = client.completions.create(model=NAME, prompt="abc", max_tokens=50_000, stream=stream)
                seen.extend(answer if stream else [answer])
            except openai.APIError as error:
                seen.append(error)

        threads = [threading.Thread(target=follow, args=(stream,)) for stream in (True, False)]
        threads[0].start()
        assert until(lambda: ending.metric("dither_generated_tokens_total") > 3)
        threads[1].start()
        assert until(lambda: len(ending.service.scheduler.inside) == 2)
        started = time.perf_counter()
        ending.server.should_exit = True
        for thread in threads:
            thread.join(20)
        assert time.perf_counter() - started < 4  # the streams ended before the grace did
        errors = [e for e in seen if isinstance(e, Exception)]
        assert len(errors) == 2 and all("shutting down" in str(e) for e in errors)
        assert {getattr(e, "status_code", None) for e in errors} == {503, None}
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", ending.port))
    bind("127.0.0.1", ending.port).close()


# -- nothing leaks -----------------------------------------------------------------------------------------------------------


def requests(server: Live, count: int, seed: int) -> None:
    """Of every kind, some by clients that leave."""

    async def one(client: httpx.AsyncClient, draw: random.Random) -> None:
        ask: dict[str, Any] = {"model": NAME, "max_tokens": draw.randrange(1, 30), "stream": draw.random() < 0.6, "n": draw.choice([1, 1, 2])}
        kind = draw.random()
        if kind < 0.4:
            path, ask = "completions", ask | {"prompt": "x" * draw.randrange(1, 200), "logprobs": draw.choice([None, 2])}
        elif kind < 0.8:
            path, ask = "chat/completions", ask | {"messages": [{"role": "user", "content": "x" * draw.randrange(1, 200)}], "stop": ["q!"]}
        else:
            path, ask = "completions", ask | {"prompt": draw.choice(["", "x" * 600, 5]), "top_p": 3}
        async with client.stream("POST", f"{server.url}/{path}", json=ask) as response:
            async for _ in response.aiter_bytes():
                if draw.random() < 0.02:
                    break

    async def several() -> None:
        draws = [random.Random(seed * 10**6 + i) for i in range(count)]
        limit = asyncio.Semaphore(30)
        async with httpx.AsyncClient(timeout=60) as client:

            async def limited(draw: random.Random) -> None:
                async with limit:
                    await one(client, draw)

            await asyncio.gather(*map(limited, draws))

    asyncio.run(several())
    assert server.settled(30)


def left(server: Live) -> tuple[int, int, int]:
    """Objects of requests, open files, and threads that are there now."""
    gc.collect()
    kinds = ("Ticket", "Sequence", "Texts", "Stepper", "GrowingLayer", "KeysValues", "Piece")
    objects = sum(type(x).__name__ in kinds and type(x).__module__.startswith("dither.") for x in gc.get_objects())
    process = psutil.Process()
    return objects, process.num_fds(), process.num_threads()


def test_nothing_is_left_of_requests(server: Live) -> None:
    others, _, _ = left(server)  # what other tests in this process still hold
    requests(server, 40, 0)
    assert until(lambda: left(server)[0] <= others), (others, left(server))
    before = left(server)
    requests(server, 80, 1)
    assert until(lambda: left(server)[1] <= before[1] + 1), (before, left(server))
    assert left(server)[0] <= others and left(server)[2] <= before[2] + 1


@pytest.mark.slow
def test_memory_is_flat_after_a_thousand_requests(server: Live) -> None:
    process, held = psutil.Process(), []
    for i in range(12):
        requests(server, 100, i)
        gc.collect()
        held.append(process.memory_info().rss)
    assert until(lambda: left(server)[0] == 0)
    growth = (sum(held[-3:]) - sum(held[2:5])) / 3  # the first hundreds fill pools and tables
    assert growth < 4e6, [round(h / 1e6, 1) for h in held]
