"""POST /score: how likely a given continuation is."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from app.api.access import tenant_of, weight_of
from app.api.admission import place_of
from app.api.answers import ScoreAnswer, answered
from app.api.body import JsonRoute
from app.api.generate import deadline
from app.api.prompts import scored_tokens
from app.api.schemas import ScoreBody
from app.api.services import services_of
from app.api.streaming import watched
from app.api.worker import new_id
from app.messages import Score, Scored

router = APIRouter(route_class=JsonRoute, tags=["generation"])


@router.post("/score", response_model=ScoreAnswer, summary="Log-probabilities of a given continuation")
async def score(body: ScoreBody, request: Request) -> Response:
    """Two strings are tokenised as one text where a token ends between them, else each by itself."""
    services = services_of(request)
    tenant = tenant_of(request, body.tenant)
    client = services.workers.of(tenant)
    model = client.require()
    place = place_of(request)
    prompt, continuation = await scored_tokens(model, client.tokenizer, body.prompt, body.continuation)
    place.take_tokens(len(prompt) + len(continuation), "continuation")
    message = Score(
        new_id(),
        tenant,
        prompt,
        continuation,
        deadline=deadline(None, services.settings),
        weight=weight_of(request),
    )
    with client.open(message, place) as stream:
        async with watched(request, stream):
            part = await stream.next()
    assert isinstance(part, Scored)
    return answered(
        ScoreAnswer(
            tenant=tenant,
            logprobs=part.logprobs,
            greedy=[first == token for first, token in zip(part.greedy, continuation, strict=True)],
            greedy_token_ids=part.greedy,
            token_ids=continuation,
            memory_version=part.memory_version,
        )
    )
