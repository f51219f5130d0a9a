"""Errors as OpenAI's clients read them: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from starlette.responses import Response


class ApiError(Exception):
    """Becomes an answer of ``status``."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": _type(self.status), "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return Response(json.dumps(self.body()), self.status, dict(self.headers or {}), "application/json")


def _type(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    if status == 401:
        return "authentication_error"
    return "invalid_request_error" if status < 500 else "server_error"


def invalid(error: ValidationError) -> ApiError:
    """The first thing that is wrong with a request. What was sent is not repeated: it may be long."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where, message = first["loc"], first["msg"].removeprefix("Value error, ")
    param = str(where[0])[:100] if where else (head if (head := message.partition(":")[0]).isidentifier() else None)
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is no JSON that can be read: {message}", code="invalid_json")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{_path(where)}: is not supported", param=param, code="unsupported_parameter")
    return ApiError(400, f"{_path(where)}: {message}" if where else message, param=param)


def _path(where: tuple[int | str, ...]) -> str:
    return ".".join(str(part)[:100] for part in where[:4])
