"""POST /v1/chat/completions and /v1/completions, GET /v1/models: for programs that speak OpenAI's protocol.

They are ``/generate`` in another form: the same checks, the same admission, the same worker.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Header, HTTPException, Request, Response
from pydantic import BeforeValidator
from pydantic_core import to_json

from app.api.access import access_of, tenant_of
from app.api.answers import Summary
from app.api.body import JsonRoute
from app.api.generate import Generation, prepared
from app.api.openai.answers import ChatCompletion, FinishReason, ModelAnswer, ModelsAnswer, TextCompletion
from app.api.openai.forms import Chat, Form, Text, head
from app.api.openai.remember import RememberKey, remember
from app.api.openai.schemas import ChatCompletionBody, CompletionBody
from app.api.schemas import TenantId, as_sent, check_tenant
from app.api.services import Use, services_of
from app.api.streaming import COMMENT, DONE, EventStream, event
from app.errors import InvalidRequest, ModelNotFound
from app.messages import ModelInfo

_NO_TENANT = "whose memory? The header X-Tenant, a key that is for one tenant, or the field user says so"
_STARTED = int(time.time())

HeaderTenant = Annotated[
    TenantId | None,
    BeforeValidator(as_sent),
    Header(alias="X-Tenant", description="whose memory, before key and user"),
]


class _Route(JsonRoute):
    def named(self, request: Request, value: dict[str, Any]) -> object:
        sent = request.headers.get("x-tenant")
        try:
            return _named(request, as_sent(sent), value.get("user"))
        except ValueError:
            # it is refused later, with its reason
            return None


router = APIRouter(route_class=_Route, prefix="/v1", tags=["OpenAI's protocol"])


def _named(request: Request, sent: object, user: object) -> object:
    """The header, else the key's own tenant (None), else ``user``: many programs send one that means nothing here."""
    if sent is not None:
        return sent
    key = access_of(request).key
    return user if key is None or key.own is None else None


@router.post(
    "/chat/completions",
    response_model=ChatCompletion,
    summary="Continue a conversation, from a tenant's memory",
    responses={200: {"content": {"text/event-stream": {}}, "description": "the answer, or its chunks"}},
)
async def chat_completions(
    body: ChatCompletionBody,
    request: Request,
    x_tenant: HeaderTenant = None,
    idempotency_key: RememberKey = None,
) -> Response:
    """Reads the memory, and changes it only if something is to be remembered first; else that goes to ``/update``."""
    return await _completion(body, request, x_tenant, Chat(), idempotency_key)


@router.post(
    "/completions",
    response_model=TextCompletion,
    summary="Continue a text, from a tenant's memory",
    responses={200: {"content": {"text/event-stream": {}}, "description": "the answer, or its chunks"}},
)
async def completions(body: CompletionBody, request: Request, x_tenant: HeaderTenant = None) -> Response:
    """Reads the memory, and does not change it: what is to be remembered goes to ``/update``."""
    return await _completion(body, request, x_tenant, Text())


@router.head("/models", include_in_schema=False)
@router.get("/models", summary="The one model that is served")
async def models(services: Use) -> ModelsAnswer:
    return ModelsAnswer(data=[_described(services.workers.clients[0].require())])


# a hub id has a slash
@router.get("/models/{model:path}", summary="The one model that is served, by its name")
async def model(model: str, services: Use) -> ModelAnswer:
    if not model:
        raise HTTPException(404)
    served = services.workers.clients[0].require()
    _check_model(model, served)
    return _described(served)


def _checked(name: object) -> str:
    """A tenant's name. Raises InvalidRequest; the header's has been checked before."""
    try:
        if isinstance(name, str):
            return check_tenant(name)
        raise ValueError("a tenant's id is a string")
    except ValueError as error:
        raise InvalidRequest(str(error), param="user") from None


def _described(served: ModelInfo) -> ModelAnswer:
    return ModelAnswer(
        id=served.name,
        created=_STARTED,
        max_model_len=served.max_sequence,
        min_context=served.min_context,
        max_context=served.max_context,
        num_tokens=served.num_tokens,
        num_blocks=served.num_blocks,
    )


def _check_model(name: str | None, served: ModelInfo) -> None:
    if name is not None and name != served.name:
        raise ModelNotFound(f"the model that is served is called {served.name}", param="model")


async def _completion(
    body: ChatCompletionBody | CompletionBody,
    request: Request,
    sent: str | None,
    form: Form,
    key: str | None = None,
) -> Response:
    named = _named(request, sent, body.user)
    tenant = tenant_of(request, None if named is None else _checked(named), param="user", missing=_NO_TENANT)
    served = services_of(request).workers.of(tenant).require()
    _check_model(body.model, served)
    first = None if body.update is None else partial(remember, request, tenant, body.update, key)
    generation = await prepared(request, tenant, body.generate, fit=True, first=first)
    begin = head(form, generation.message.id, served)
    if body.stream:
        return EventStream(_chunks(generation, form, begin, usage=body.with_usage))
    whole = await generation.whole()
    summary = generation.output.summary()
    answer = {
        **begin,
        "object": form.object,
        "choices": [form.whole(whole, _reason(summary))],
        "usage": summary.usage.model_dump(),
        "memory_version": summary.memory_version,
    }
    return Response(to_json(answer), media_type="application/json")


async def _chunks(
    generation: Generation, form: Form, begin: dict[str, Any], *, usage: bool
) -> AsyncGenerator[bytes]:
    begin = {**begin, "object": form.chunk}
    # the protocol has it in every chunk, once it has been asked for
    none: dict[str, Any] = {"usage": None} if usage else {}
    async with aclosing(generation.deltas()) as deltas:
        async for delta in deltas:
            if delta is None:
                yield COMMENT
            elif generation.output.finished is not None:
                summary = generation.output.summary()
                choice = form.piece(delta, _reason(summary))
                yield event({**begin, "choices": [choice], **none, "memory_version": summary.memory_version})
                if usage:
                    yield event({**begin, "choices": [], "usage": summary.usage.model_dump()})
            elif delta.text or delta.logprobs:
                yield event({**begin, "choices": [form.piece(delta, None)], **none})
    yield DONE


def _reason(summary: Summary) -> FinishReason:
    return "length" if summary.finish_reason == "length" else "stop"
