"""The routes: /v1/models, /v1/completions, /v1/chat/completions, /health and /metrics."""

from __future__ import annotations

import asyncio
import hmac
from typing import TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dither.serve.answers import Texts
from dither.serve.errors import ApiError, invalid
from dither.serve.forms import ChatForm, CompletionForm
from dither.serve.metrics import CONTENT_TYPE
from dither.serve.schemas import Ask, ChatAsk, CompletionAsk, ModelCard, ModelList
from dither.serve.service import Limits, Service

_A = TypeVar("_A", bound=Ask)
_PATIENCE = 16  # times the largest body: so much of a larger one is read and dropped before the connection is closed on it


def create_app(service: Service, api_key: str | None = None) -> FastAPI:
    """``api_key``: what clients must send as "Authorization: Bearer KEY" to anything under /v1; None: nothing."""
    app = FastAPI(title="dither", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(_Counted, service=service)
    app.add_exception_handler(ApiError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(Exception, _answer_surprise)
    card = ModelCard(id=service.name, created=service.created)

    def check_key(request: Request) -> None:
        if api_key is None:
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode("latin-1"), api_key.encode()):
            message = "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'"
            raise ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})

    @app.get("/v1/models")
    async def models(request: Request) -> JSONResponse:
        check_key(request)
        return JSONResponse(ModelList(data=[card]).model_dump())

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> JSONResponse:
        check_key(request)
        if name != service.name:
            raise service.not_served(name)
        return JSONResponse(card.model_dump())

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        check_key(request)
        ask = await _read(request, CompletionAsk, service.limits)
        return Texts(service, CompletionForm(service.tokens, ask.top()), ask, await service.sequences(ask))

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        check_key(request)
        ask = await _read(request, ChatAsk, service.limits)
        return Texts(service, ChatForm(service.tokens, ask.top()), ask, await service.sequences(ask))

    @app.get("/health")
    async def health() -> JSONResponse:
        alive = service.scheduler.alive
        return JSONResponse({"status": "ok" if alive else "failed", "model": service.name}, 200 if alive else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.page(), media_type=CONTENT_TYPE)

    return app


async def _read(request: Request, kind: type[_A], limits: Limits) -> _A:
    """The request's body, checked. It is measured while it comes in: no more than the limit is ever held."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "send the body as 'Content-Type: application/json'")  # so that no page of a browser can post here unasked
    body, dropped = bytearray(), 0
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for chunk in request.stream():
                if dropped or len(body) + len(chunk) > limits.max_body:
                    dropped += len(body) + len(chunk)
                    body.clear()
                    if dropped > _PATIENCE * limits.max_body:
                        break
                else:
                    body += chunk
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {limits.body_seconds:g} seconds", headers={"connection": "close"}) from None
    except ClientDisconnect:
        raise ApiError(400, "the client left before its body was here") from None
    if dropped:
        raise ApiError(413, f"the body is larger than {limits.max_body} bytes", code="request_too_large", headers={"connection": "close"})
    try:
        return kind.model_validate_json(bytes(body))
    except ValidationError as error:
        raise invalid(error) from None


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = {404: f"there is nothing at {request.url.path[:100]}", 405: f"{request.method} is not for {request.url.path[:100]}"}
    return ApiError(error.status_code, message.get(error.status_code, str(error.detail)), headers=error.headers).response()


async def _answer_surprise(request: Request, error: Exception) -> Response:
    return ApiError(500, f"the server failed: {type(error).__name__}").response()


class _Counted:
    """Counts answers by path and status; what is no route of ours counts as "other", so that strangers cannot fill the registry."""

    _PATHS = ("/v1/models", "/v1/completions", "/v1/chat/completions", "/health", "/metrics")

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = scope.get("path", "")
                self.service.metrics.requests.labels(path if path in self._PATHS else "other", message["status"]).inc()
            await send(message)

        await self.app(scope, receive, counted if scope["type"] == "http" else send)


