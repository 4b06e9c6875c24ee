"""A text that the memory takes in before a chat is answered from it: ``/update`` and ``/generate`` in one call."""

from __future__ import annotations

from typing import Annotated

from fastapi import Header, Request
from pydantic import TypeAdapter

from app.api import update
from app.api.admission import place_of
from app.api.schemas import IdempotencyKey, UpdateBody, as_sent
from app.errors import InvalidRequest, ServiceError

# looked at only where there is something to remember: other chats may send what they like
RememberKey = Annotated[
    str | None, Header(alias="Idempotency-Key", description="of the text in remember, as for /update")
]
_KEY: TypeAdapter[str] = TypeAdapter(IdempotencyKey)


async def remember(request: Request, tenant: str, body: UpdateBody, key: str | None) -> None:
    """Returns when the text is durable. ``tenant`` is from ``tenant_of``, ``key`` the header as it came.

    Raises what ``/update`` answers with, and InvalidRequest without a key: clients of this protocol repeat by
    themselves what failed, and without one would teach the text anew each time its answer fails.
    """
    try:
        client, message, _ = await update.prepared(request, tenant, body, _checked(key))
        await client.ask(message, place_of(request))
    except ServiceError as error:
        if error.param == "text":
            error.param = "remember"
        elif error.param == "idempotency_key":
            error.param = "Idempotency-Key"
        raise


def _checked(key: str | None) -> str:
    if key is None:
        raise InvalidRequest(
            "remember needs the header Idempotency-Key, so that a repeated request teaches it once",
            param="Idempotency-Key",
        )
    try:
        return _KEY.validate_python(as_sent(key))
    except ValueError:
        raise InvalidRequest("a key has 1 to 256 characters, in UTF-8", param="Idempotency-Key") from None
