"""Every error in the one shape, ``{"error": {"message", "type", "code", "param"}, "request_id"}``.

Nothing that was sent comes back in it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from app.api import schemas
from app.errors import DeadlineExceeded, InvalidRequest, RequestCrashed, RequestTooSlow, ServiceError

_STATUS_CODES = {404: "not_found", 405: "method_not_allowed"}
_STATUS_MESSAGES = {404: "there is nothing at this path", 405: "this path does not take this method"}

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


def error_response(error: ServiceError, request_id: str) -> JSONResponse:
    headers = {}
    if error.retry_after is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))
    elif _stays(error):
        headers["x-should-retry"] = "false"
    if isinstance(error, RequestTooSlow):
        headers["connection"] = "close"
    return JSONResponse(error_body(error, request_id), status_code=error.status, headers=headers)


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
    """Handlers for everything that ends a request early; what they miss the outermost middleware catches."""

    async def service_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ServiceError)
        return error_response(error, request_id(request))

    async def validation_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return error_response(from_validation(error.errors()), request_id(request))

    async def http_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        message = _STATUS_MESSAGES.get(error.status_code, "the request cannot be served")
        if error.status_code == 404 and _OPENAI.fullmatch(request.scope["path"]):
            message = _OPENAI_MESSAGE
        answer = ServiceError(message)
        body = error_body(answer, request_id(request))
        body["error"]["type"] = "not_found_error" if error.status_code == 404 else "invalid_request_error"
        body["error"]["code"] = _STATUS_CODES.get(error.status_code, "invalid_request")
        return JSONResponse(body, status_code=error.status_code, headers=error.headers)

    app.add_exception_handler(ServiceError, service_error)
    app.add_exception_handler(RequestValidationError, validation_error)
    app.add_exception_handler(HTTPException, http_error)
