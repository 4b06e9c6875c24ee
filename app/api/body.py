"""JSON bodies: read whole, parsed strictly, each failure a 4xx of its own, and never on the loop when large."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.requests import ClientDisconnect

from app.api.access import check_room
from app.api.stream import ClientGone
from app.errors import MalformedBody, UnsupportedMediaType

# parsing this much takes under a millisecond
INLINE_BYTES = 1 << 16


class _Parsed(Request):
    """A request whose JSON body is already there."""

    def __init__(self, request: Request, value: Any) -> None:
        super().__init__(request.scope, request.receive)
        self._value = value

    async def body(self) -> bytes:
        # FastAPI asks only whether there is one
        return b"{}"

    async def json(self) -> Any:
        return self._value


class JsonRoute(APIRoute):
    """A route that parses its body by ``parse``. FastAPI's own way takes NaN and lone surrogates.

    The schema of the body, and with it the OpenAPI document, stays FastAPI's affair.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()
        if self.body_field is None:
            return handler

        async def handle(request: Request) -> Response:
            check_content_type(request)
            try:
                body = await request.body()
            except ClientDisconnect:
                raise ClientGone from None
            if not body:
                raise MalformedBody("the body is empty; a JSON object is expected")
            if len(body) <= INLINE_BYTES:
                value = parse(body)
            else:
                value = await asyncio.to_thread(parse, body)
            check_room(request, self.named(request, value))
            return await handler(_Parsed(request, value))

        return handle

    def named(self, request: Request, value: dict[str, Any]) -> object:
        """The tenant that the request names, as it came; None: it names none."""
        return value.get("tenant")


def parse(body: bytes) -> dict[str, Any]:
    """The JSON object in ``body``.

    Raises MalformedBody for anything else: no JSON, bytes that are not UTF-8, lone surrogates, NaN, nesting
    deeper than 200, numbers of thousands of digits.
    """
    try:
        value = from_json(body, allow_inf_nan=False, cache_strings="keys")
    except ValueError:
        # the parser's message may quote the body
        raise MalformedBody("the body is not valid JSON in UTF-8") from None
    if not isinstance(value, dict):
        raise MalformedBody("the body is not a JSON object")
    return value


def check_content_type(request: Request, wanted: str = "application/json") -> None:
    """Raises UnsupportedMediaType unless the body is announced as plain ``wanted``. No body: that is said later."""
    if request.headers.get("content-length", "0") == "0" and "transfer-encoding" not in request.headers:
        return
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != wanted:
        raise UnsupportedMediaType(f"the content type must be {wanted}")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise UnsupportedMediaType("the body must not be compressed")
