"""Clients that send garbage: an answer in OpenAI's shape with the right status, or a closed connection; and the next client is served."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

import live_server
from dither.serve.service import Limits
from live_server import NAME, Live

GOOD = {"model": NAME, "prompt": "abc", "max_tokens": 4, "temperature": 0}
JSON = {"content-type": "application/json"}


def post(server: Live, content: bytes, path: str = "completions", headers: dict[str, str] | None = None) -> httpx.Response:
    return httpx.post(f"{server.url}/{path}", content=content, headers=headers or JSON, timeout=60)


def refused(response: httpx.Response, status: int, *words: str, kind: str = "invalid_request_error") -> dict[str, Any]:
    assert response.status_code == status, response.text[:300]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == kind
    assert all(word in error["message"] for word in words), error["message"]
    assert len(response.content) < 1000 and "Traceback" not in response.text
    return dict(error)


@pytest.fixture(autouse=True)
def _still_serves(server: Live) -> Iterator[None]:
    yield
    assert post(server, json.dumps(GOOD).encode()).json()["usage"]["completion_tokens"] == 4 and server.settled()
    assert httpx.get(f"{server.root}/health").json() == {"status": "ok", "model": NAME}


BODIES: list[tuple[bytes, str]] = [
    (b"", "no JSON"),
    (b"{", "no JSON"),
    (b"\x00\xff\xfe garbage", "no JSON"),
    (b'{"model": "tiny", "prompt": "\xff\xfe"}', ""),  # invalid UTF-8
    (b'{"model": "tiny", "prompt": "\xed\xa0\x80"}', ""),  # a surrogate in UTF-8
    (b'{"model": "tiny", "prompt": "\\ud800"}', ""),  # half a pair
    (b'{"model": "tiny", "prompt": NaN}', ""),
    (b'{"model": "tiny", "prompt": "a", "temperature": NaN}', ""),
    (b'{"model": "tiny", "prompt": "a", "temperature": 1e999}', "temperature"),
    (b'{"model": "tiny", "prompt": "a", "seed": 1e30}', "seed"),
    (b'{"model": "tiny", "prompt": "a", "seed": 99999999999999999999999}', "seed"),
    (b'{"model": "tiny", "prompt": "a", "max_tokens": 99999999999999999999999}', "max_tokens"),
    (b'{"model": "tiny", "prompt": [99999999999999999999999]}', "prompt"),
    (b"[" * 100_000, "no JSON"),
    (b'{"model": "tiny", "prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}", ""),
    (b'{"model": "tiny", "prompt": {"a": 1}}', "prompt"),
    (b"[]", ""),
    (b"null", ""),
    (b'"text"', ""),
    (b'{"prompt": "a"}', "model"),
    (b'{"model": "tiny"}', "prompt"),
    (b'{"model": "tiny", "prompt": "a", "' + b"x" * 3000 + b'": 1}', "is not supported"),
    (b'{"model": "tiny", "prompt": "a", "logit_bias": {"x": 1}}', "logit_bias"),
    (b'{"model": "tiny", "prompt": "a", "stop": [1]}', "stop"),
]


@pytest.mark.parametrize(("body", "words"), BODIES, ids=[str(i) for i in range(len(BODIES))])
def test_bodies(server: Live, body: bytes, words: str) -> None:
    refused(post(server, body), 400, words)


def test_other_kinds_of_requests(server: Live) -> None:
    good = json.dumps(GOOD).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        refused(post(server, good, headers={"content-type": kind}), 415, "application/json")
    assert post(server, good, headers={"content-type": "Application/JSON; charset=utf-8"}).status_code == 200
    refused(post(server, good, headers=JSON | {"content-encoding": "gzip"}, path="nothing"), 404, "/v1/nothing")
    refused(httpx.get(f"{server.url}/completions"), 405, "GET")
    refused(httpx.get(f"{server.root}/{'x' * 2000}"), 404)
    refused(httpx.get(f"{server.url}/models/..%2f..%2fetc%2fpasswd"), 404)
    refused(post(server, json.dumps(GOOD | {"model": "\x00\x1b[31m" + "x" * 200}).encode()), 404)
    strange = json.dumps(GOOD | {"prompt": "\x00\u202e🙂\U0010ffff" * 20}).encode()
    assert post(server, strange).json()["usage"]["completion_tokens"] == 4


def test_ten_megabytes(server: Live) -> None:
    big = json.dumps(GOOD | {"prompt": "x" * 10_000_000}).encode()
    assert refused(post(server, big), 413, "1048576 bytes")["code"] == "request_too_large"

    def pieces() -> Iterator[bytes]:  # without a length in the header
        for start in range(0, len(big), 100_000):
            yield big[start : start + 100_000]

    refused(httpx.post(f"{server.url}/completions", content=pieces(), headers=JSON, timeout=60), 413)
    with live_server.live(limits=Limits(max_body=20 << 20)) as wide:
        assert refused(post(wide, big), 400, "10000000 characters")["code"] == "context_length_exceeded"
        talk = json.dumps({"model": NAME, "messages": [{"role": "user", "content": "x" * 10_000_000}]}).encode()
        assert refused(post(wide, talk, "chat/completions"), 400, "10000000 characters")["param"] == "messages"


def test_a_body_without_end_is_cut_off() -> None:
    with live_server.live(limits=Limits(max_body=1000)) as small, socket.create_connection(("127.0.0.1", small.port)) as endless:
        endless.settimeout(20)
        endless.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n")
        sent = 0
        try:
            while sent < 50_000_000:
                endless.sendall(b"fa0\r\n" + b"x" * 4000 + b"\r\n")
                sent += 4000
        except OSError:
            pass
        assert sent < 50_000_000


def test_a_body_that_never_comes() -> None:
    with live_server.live(limits=Limits(body_seconds=0.2)) as hasty, socket.create_connection(("127.0.0.1", hasty.port)) as slow:
        slow.settimeout(10)
        slow.sendall(b'POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"model"')
        started = time.perf_counter()
        answer = b"".join(iter(lambda: slow.recv(1 << 16), b""))
        assert answer.startswith(b"HTTP/1.1 408") and b"within 0.2 seconds" in answer and time.perf_counter() - started < 5


@pytest.mark.parametrize(
    "raw",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\nxx",
        b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 200_000 + b"\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{",  # and gone
        b"\r\n\r\n\r\n",
        b"",
    ],
    ids=str,
)
def test_no_http(server: Live, raw: bytes) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.settimeout(0.3)
        try:
            connection.sendall(raw)
            answer = connection.recv(1 << 16)
        except (TimeoutError, OSError):
            answer = b""
    assert answer == b"" or b" 4" in answer.split(b"\r\n")[0]
