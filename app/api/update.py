"""POST /update: takes a text into a tenant's memory, and answers when it is durable."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from functools import partial
from typing import Annotated, Literal

from fastapi import APIRouter, Header, Request, Response
from pydantic import BeforeValidator

from app.api import contexts
from app.api.access import access_of, tenant_of, weight_of
from app.api.admission import Place, place_of
from app.api.answers import UpdateAnswer, answered, update_timings
from app.api.body import JsonRoute
from app.api.prompts import render
from app.api.schemas import IdempotencyKey, UpdateBody, as_sent
from app.api.services import services_of
from app.api.streaming import COMMENT, EventStream, event, parts
from app.api.suspects import SERVER_KEY
from app.api.tokens import INLINE_CHARS, Tokenizer, check_tokens, need
from app.api.worker import WorkerClient, new_id
from app.errors import InvalidRequest, TooManyTokens
from app.messages import Context, ModelInfo, Update, Updated, UpdateProgress
from app.settings import Settings

router = APIRouter(route_class=JsonRoute, tags=["memory"])

Short = Literal["none", "repeated"]


# the same key as the same text in the body
HeaderKey = Annotated[IdempotencyKey | None, BeforeValidator(as_sent), Header(alias="Idempotency-Key")]


@router.post(
    "/update",
    response_model=UpdateAnswer,
    summary="Take a text into a tenant's memory",
    responses={
        200: {"content": {"text/event-stream": {}}, "description": "durable (or the events until it is)"}
    },
)
async def update(
    body: UpdateBody,
    request: Request,
    idempotency_key: HeaderKey = None,
) -> Response:
    """Answers once every block is durable and readable. A client that goes away does not stop it."""
    tenant, place = tenant_of(request, body.tenant), place_of(request)
    client, message, short = await prepared(request, tenant, body, idempotency_key)
    if body.stream:
        return EventStream(_events(client, message, short, place))
    part = await client.ask(message, place)
    assert isinstance(part, Updated)
    return answered(_answer(message, part, short))


async def prepared(
    request: Request, tenant: str, body: UpdateBody, header_key: str | None
) -> tuple[WorkerClient, Update, Short]:
    """The update that ``body`` asks for, checked and admitted, and not yet sent, and whom to send it to. ``tenant`` is
    from ``tenant_of``, and the body's own is not looked at."""
    services = services_of(request)
    client = services.workers.of(tenant)
    model = client.require()
    # with a key the update can be sent to another worker if this one ends
    key = _one_key(body.idempotency_key, header_key) or f"{SERVER_KEY}{new_id()}"
    cut, short = await _contexts(body, model, client.tokenizer, services.settings)
    param = "text" if body.messages is None else "messages"
    place_of(request).take_tokens(sum(len(context.tokens) for context in cut), param)
    limits = access_of(request).limits
    message = Update(new_id(), tenant, cut, key, limits.updates_per_day, limits.bytes, weight_of(request))
    return client, message, short


async def _events(client: WorkerClient, message: Update, short: Short, place: Place) -> AsyncGenerator[bytes]:
    with client.open(message, place) as stream:
        async for part in parts(stream):
            if isinstance(part, UpdateProgress):
                progress: dict[str, object] = {
                    "done": part.done,
                    "total": part.total,
                    "memory_version": part.memory_version,
                }
                yield event(progress, "progress")
            elif isinstance(part, Updated):
                yield event(_answer(message, part, short), "done")
            else:
                yield COMMENT


def _answer(message: Update, part: Updated, short: Short) -> UpdateAnswer:
    own = (message.idempotency_key or "").startswith(SERVER_KEY)
    return UpdateAnswer(
        tenant=message.tenant,
        memory_version=part.memory_version,
        blocks=part.blocks,
        tokens=part.tokens,
        surviving_share=part.surviving_share,
        timings=update_timings(part.timings),
        replayed=part.replayed and not own,
        short=short,
    )


def _one_key(in_body: str | None, in_header: str | None) -> str | None:
    if in_body is not None and in_header is not None and in_body != in_header:
        raise InvalidRequest(
            "the Idempotency-Key header and idempotency_key in the body differ", param="idempotency_key"
        )
    key = in_body if in_body is not None else in_header
    if key is not None and key.startswith(SERVER_KEY):
        raise InvalidRequest(
            f"keys that begin with {SERVER_KEY} are the server's own", param="idempotency_key"
        )
    return key


async def _contexts(
    body: UpdateBody, model: ModelInfo, tokenizer: Tokenizer | None, settings: Settings
) -> tuple[list[Context], Short]:
    """Raises ContextTooShort, TooManyTokens, NoTokenizer, InvalidRequest."""
    sizes = contexts.Sizes(model.min_context, model.max_context, model.num_tokens)
    least = {"refuse": 0, "repeat": sizes.least, "fill": sizes.full}[body.short]
    if isinstance(body.text, list):
        check_tokens(body.text, model.vocab_size, "text")
        if len(body.text) > settings.max_update_tokens:
            raise TooManyTokens(
                f"more than the {settings.max_update_tokens:,} tokens that are allowed", param="text"
            )
        if len(body.text) < least:
            return [contexts.repeat_tokens(body.text, sizes)], "repeated"
        if len(body.text) < sizes.least:
            raise contexts.too_short(len(body.text), sizes, "text")
        return contexts.cut_tokens(body.text, sizes), "none"
    param = "text" if body.messages is None else "messages"
    known = need(tokenizer, param)
    if body.messages is not None:
        text = await render(known, body.messages, prompt=False)
    else:
        text = body.text or ""
    cut = partial(cut_or_repeat, text, sizes, known, settings.max_update_tokens, least, param)
    return cut() if len(text) <= INLINE_CHARS else await asyncio.to_thread(cut)


def cut_or_repeat(
    text: str, sizes: contexts.Sizes, tokenizer: Tokenizer, limit: int, least: int, param: str
) -> tuple[list[Context], Short]:
    """A text's contexts, and what was done if it is short: one of fewer than ``least`` tokens is repeated.

    Raises ContextTooShort, TooManyTokens, InvalidRequest.
    """
    encode = partial(tokenizer.encode, limit=limit, param=param)
    pieces = contexts.cut_text(text, sizes, encode)
    tokens = pieces[0].tokens
    if len(pieces) > 1 or len(tokens) >= max(least, sizes.least):
        return pieces, "none"
    if not tokens:
        raise InvalidRequest("the text has no tokens", param=param)
    if len(tokens) >= least:
        raise contexts.too_short(len(tokens), sizes, param)
    return [contexts.repeat_text(text, tokens, sizes, tokenizer.encode)], "repeated"
