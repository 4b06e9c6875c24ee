"""Every error in the one shape, ``{"error": {"message", "type", "code", "param"}, "request_id"}``.

Nothing that was sent comes back in it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from app.api import schemas
from app.errors import (
    DeadlineExceeded,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    RequestCrashed,
    RequestTooSlow,
    ServiceError,
)

# seconds of Retry-After up to which OpenAI's clients wait; before a longer time has passed they ask again at once
_HEEDED = 60

_OF_STATUS = {
    404: NotFound("there is nothing at this path"),
    405: MethodNotAllowed("this path does not take this method"),
}

# where programs look for OpenAI's protocol that have another base address, or want another part of it
_OPENAI = re.compile(
    r"(?:/+(?:v1|api|openai))*/+(?:chat/completions|completions|models|responses|embeddings)/*"
)
_OPENAI_MESSAGE = (
    "there is nothing at this path: of OpenAI's protocol there are /v1/chat/completions, /v1/completions and "
    "/v1/models, so that the base address ends in /v1"
)


def error_body(error: ServiceError, request_id: str) -> dict[str, Any]:
    return {
        "error": {
            "message": error.message,
            "type": error.type,
            "code": error.code,
            "param": error.param,
        },
        "request_id": request_id,
    }


def note(scope: Scope, error: ServiceError) -> None:
    """Leaves what a request is answered with where the outermost middleware finds it, for the log and the metrics."""
    scope["error"] = error


class ErrorResponse(JSONResponse):
    """Answers with ``error``, under the status of its class or another."""

    def __init__(
        self,
        error: ServiceError,
        request_id: str,
        status: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(error_body(error, request_id), status_code=status or error.status, headers=headers)
        self.error = error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        note(scope, self.error)
        await super().__call__(scope, receive, send)


def error_response(error: ServiceError, request_id: str) -> ErrorResponse:
    headers = {}
    if error.retry_after is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))
    if _stays(error) and (error.retry_after is None or error.retry_after > _HEEDED):
        headers["x-should-retry"] = "false"
    if isinstance(error, RequestTooSlow):
        headers["connection"] = "close"
    return ErrorResponse(error, request_id, headers=headers)


def _stays(error: ServiceError) -> bool:
    """Whether the same request is in vain, by what OpenAI's clients would repeat: they do with every 408, 409, 429 and
    5xx. Where it is not known (an internal error, a store that fails) it is left to them."""
    return error.status in (409, 429) or isinstance(error, RequestCrashed | DeadlineExceeded)


def request_id(request: Request) -> str:
    """Set by the outermost middleware for every request."""
    return str(request.scope.get("request_id", ""))


def from_validation(errors: Sequence[Any]) -> InvalidRequest:
    """The first field at fault and what is wrong with it, without the value.

    A field of several types has an error for each; the one that got furthest into the value is meant. Names that
    the schemas do not know are the caller's text and are left out of ``param``.
    """
    field = _path(errors[0])[:1]
    meant = [error for error in errors[:64] if _path(error)[:1] == field]
    deepest = max((_path(error) for error in meant), key=len)
    reasons = dict.fromkeys(_reason(error) for error in meant if _path(error) == deepest)
    return InvalidRequest("; ".join(reasons), param=".".join(deepest) or None)


def _path(error: Any) -> list[str]:
    known = schemas.field_names()
    return [
        str(part)
        for part in error["loc"][1:]
        if isinstance(part, int) or (isinstance(part, str) and part in known)
    ]


def _reason(error: Any) -> str:
    if error["type"] == "extra_forbidden":
        # a name that other calls have is the service's own word
        name = error["loc"][-1]
        return f"this call does not take {name}" if name in schemas.field_names() else "unknown field"
    message = str(error["msg"]).removeprefix("Value error, ")
    return message[:1].lower() + message[1:]


def install(app: FastAPI) -> None:
    """Handlers for everything that ends a request early; what they miss ``LastResort`` catches."""

    async def service_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ServiceError)
        return error_response(error, request_id(request))

    async def validation_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return error_response(from_validation(error.errors()), request_id(request))

    async def http_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        answer = _OF_STATUS.get(error.status_code) or InvalidRequest("the request cannot be served")
        if error.status_code == 404 and _OPENAI.fullmatch(request.scope["path"]):
            answer = NotFound(_OPENAI_MESSAGE)
        return ErrorResponse(answer, request_id(request), error.status_code, error.headers)

    app.add_exception_handler(ServiceError, service_error)
    app.add_exception_handler(RequestValidationError, validation_error)
    app.add_exception_handler(HTTPException, http_error)
