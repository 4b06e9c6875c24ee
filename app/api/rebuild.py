"""POST /tenants/{tenant}/rebuild: a memory written anew, by the model that is served, from its kept texts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial

from fastapi import APIRouter, Request, Response

from app.api import contexts
from app.api.access import access_of
from app.api.admission import Place, place_of
from app.api.answers import RebuildAnswer
from app.api.body import JsonRoute
from app.api.schemas import RebuildBody
from app.api.services import Services, Use
from app.api.streaming import COMMENT, EventStream, event, parts
from app.api.tenants import Named, ask, tenant_answer
from app.api.tokens import Tokenizer, need
from app.api.update import cut_or_repeat
from app.api.worker import new_id
from app.errors import VersionConflict
from app.messages import (
    Context,
    GetTenant,
    GetTexts,
    KeptText,
    ModelInfo,
    RebuildTenant,
    RebuiltContext,
    Reply,
    TenantInfo,
    Texts,
    UpdateProgress,
)

router = APIRouter(route_class=JsonRoute, prefix="/tenants", tags=["memories"])

# an update that comes between the reading of the texts and the rebuild makes it begin again
_TRIES = 3
_MOST_TOKENS = 2**31


@router.post(
    "/{tenant}/rebuild",
    response_model=RebuildAnswer,
    summary="Write a memory anew from its kept texts, for the model that is served",
    responses={
        200: {"content": {"text/event-stream": {}}, "description": "durable (or the events until it is)"}
    },
)
async def rebuild(
    tenant: Named, body: RebuildBody, request: Request, services: Use
) -> Response | RebuildAnswer:
    """What a memory of another model needs. The old one stays until the new one takes its place, all at once."""
    most_bytes = access_of(request).limits.bytes
    rebuilt = _rebuilt(services, tenant, body.force, place_of(request), most_bytes)
    if body.stream:
        return EventStream(_events(rebuilt))
    async with aclosing(rebuilt) as rebuilding:
        async for part in rebuilding:
            if isinstance(part, RebuildAnswer):
                return part
    raise AssertionError("a rebuild ends in an answer or an error")


async def _events(rebuilt: AsyncGenerator[UpdateProgress | RebuildAnswer | None]) -> AsyncGenerator[bytes]:
    async with aclosing(rebuilt) as rebuilding:
        async for part in rebuilding:
            if isinstance(part, RebuildAnswer):
                yield event(part, "done")
            elif part is None:
                yield COMMENT
            else:
                progress: dict[str, object] = {
                    "done": part.done,
                    "total": part.total,
                    "memory_version": part.memory_version,
                }
                yield event(progress, "progress")


async def _rebuilt(
    services: Services, tenant: str, force: bool, place: Place, most_bytes: int
) -> AsyncGenerator[UpdateProgress | RebuildAnswer | None]:
    """Progress, None for silence, and in the end the answer. Raises TextsNotKept, NoTokenizer, VersionConflict…"""
    client = services.workers.of(tenant)
    model = client.require()
    for last in range(_TRIES):
        texts = await ask(services, tenant, GetTexts(new_id(), tenant), Texts)
        if texts.current and not force:
            yield _answer(await ask(services, tenant, GetTenant(new_id(), tenant), TenantInfo), None)
            return
        pieces: list[RebuiltContext] = []
        if texts.texts:
            tokenizer = need(client.tokenizer, "tenant")
            pieces = await asyncio.to_thread(_pieces, texts, model, tokenizer)
        message = RebuildTenant(new_id(), tenant, texts.lineage, texts.memory_version, pieces, most_bytes)
        place.take_tokens(sum(len(piece.tokens) for piece in pieces), None)
        try:
            with client.open(message, place) as stream:
                async for part in parts(stream):
                    if isinstance(part, Reply):
                        assert isinstance(part.body, TenantInfo)
                        yield _answer(part.body, pieces)
                    elif part is None or isinstance(part, UpdateProgress):
                        yield part
            return
        except VersionConflict:
            if last == _TRIES - 1:
                raise


def _pieces(texts: Texts, model: ModelInfo, tokenizer: Tokenizer) -> list[RebuiltContext]:
    """The contexts that updates with these texts would have today; what is too short, or was repeated, is repeated."""
    sizes = contexts.Sizes(model.min_context, model.max_context, model.num_tokens)
    return [
        RebuiltContext(piece.tokens, piece.text or "", kept.memory_version)
        for kept in texts.texts
        for piece in _cut(kept, sizes, tokenizer)
    ]


def _cut(kept: KeptText, sizes: contexts.Sizes, tokenizer: Tokenizer) -> list[Context]:
    # a text that was taken once is taken again, whatever the limit for new ones has become
    cut = partial(cut_or_repeat, sizes=sizes, tokenizer=tokenizer, limit=_MOST_TOKENS, param="text")
    pieces, short = cut(kept.text, least=sizes.least)
    if short == "none" and kept.tokens >= 2 * len(pieces[0].tokens) and len(pieces) == 1:
        # it was written more than once, to fill a block
        return cut(kept.text, least=sizes.full)[0]
    if len(pieces) == 1 and len(pieces[0].tokens) != kept.tokens and kept.text.strip():
        # a piece of a longer text was told without the white space at its end
        stripped, _ = cut(kept.text.rstrip(), least=sizes.least)
        if len(stripped) == 1 and len(stripped[0].tokens) == kept.tokens:
            return [Context(stripped[0].tokens, kept.text)]
    return pieces


def _answer(info: TenantInfo, pieces: list[RebuiltContext] | None) -> RebuildAnswer:
    return RebuildAnswer(
        **tenant_answer(info).model_dump(),
        rebuilt=pieces is not None,
        blocks=len(pieces or ()),
        tokens=sum(len(piece.tokens) for piece in pieces or ()),
    )
