"""One server for the tests of a file, and a client that does not retry."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from openai import OpenAI

import live_server
from dither.serve.service import Limits


@pytest.fixture(scope="module")
def server() -> Iterator[live_server.Live]:
    with live_server.live(limits=Limits(max_tokens=400, max_body=1 << 20)) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: live_server.Live) -> OpenAI:
    return OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=60)
