"""POST /generate: text from a prompt and the tenant's memory, at once or as it comes."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass

from fastapi import APIRouter, Request, Response

from app.api.access import tenant_of, weight_of
from app.api.admission import place_of
from app.api.answers import (
    GenerateAnswer,
    GenerateChunk,
    Summary,
    TokenLogprob,
    TopToken,
    Usage,
    answered,
    timings,
)
from app.api.body import JsonRoute
from app.api.detokenize import Detokenizer, StopStrings
from app.api.metrics import Metrics
from app.api.prompts import prompt_tokens
from app.api.schemas import GenerateBody
from app.api.services import services_of
from app.api.stream import Part, Stream
from app.api.streaming import COMMENT, DONE, EventStream, event, parts, watched
from app.api.tokens import Tokenizer, need
from app.api.worker import WorkerClient, new_id
from app.errors import ContextLengthExceeded, TooManyTokens
from app.messages import Finished, Generate, ModelInfo, Sampling, Tokens
from app.messages import TokenLogprob as WorkerLogprob
from app.settings import Settings

router = APIRouter(route_class=JsonRoute, tags=["generation"])


@router.post(
    "/generate",
    response_model=GenerateAnswer,
    response_model_exclude_none=True,
    summary="Generate from a prompt and a tenant's memory",
    responses={
        200: {"content": {"text/event-stream": {}}, "description": "the text (or its pieces as events)"}
    },
)
async def generate(body: GenerateBody, request: Request) -> Response:
    """The whole generation reads the one memory version it began with. A client that goes away ends it."""
    generation = await prepared(request, tenant_of(request, body.tenant), body)
    message, output = generation.message, generation.output
    if body.stream:
        return EventStream(_events(generation, body))
    whole = await generation.whole()
    answer = GenerateAnswer(
        id=message.id,
        tenant=message.tenant,
        text=whole.text,
        token_ids=whole.tokens if body.return_token_ids else None,
        logprobs=whole.logprobs,
        **dict(output.summary()),
    )
    return answered(answer, exclude_none=True)


async def _events(generation: Generation, body: GenerateBody) -> AsyncGenerator[bytes]:
    message, output = generation.message, generation.output
    async with aclosing(generation.deltas()) as deltas:
        async for delta in deltas:
            if delta is None:
                yield COMMENT
                continue
            chunk = GenerateChunk(
                text=delta.text,
                token_ids=delta.tokens if body.return_token_ids and delta.tokens else None,
                logprobs=delta.logprobs or None,
            )
            if output.finished is not None:
                summary = dict(output.summary())
                yield event(chunk.model_copy(update={"id": message.id, "tenant": message.tenant, **summary}))
            elif delta.text or chunk.token_ids or chunk.logprobs:
                yield event(chunk)
    yield DONE


async def prepared(
    request: Request,
    tenant: str,
    body: GenerateBody,
    *,
    fit: bool = False,
    first: Callable[[], Awaitable[None]] | None = None,
) -> Generation:
    """The generation that ``body`` asks for, checked and admitted, and not yet sent. ``tenant`` is from ``tenant_of``,
    and the body's own is not looked at. With ``fit``, as OpenAI's protocol has it, ``max_tokens`` is an upper bound:
    where the prompt leaves room for fewer these will do, and one that leaves none raises ContextLengthExceeded. What
    is to be done ``first`` is done when all has been checked, and the generation begins behind it."""
    services = services_of(request)
    client = services.workers.of(tenant)
    model = client.require()
    if body.stops:
        need(client.tokenizer, "stop")
    least = 1 if fit else body.max_tokens
    try:
        tokens = await prompt_tokens(model, client.tokenizer, body.prompt, body.messages, least)
    except TooManyTokens as error:
        if not fit:
            raise
        raise ContextLengthExceeded(
            f"This model's maximum context length is {model.max_sequence} tokens; so long a prompt leaves no room "
            "for an answer",
            param=error.param,
        ) from None
    began, place = request.scope["began"], place_of(request)
    param = "prompt" if body.messages is None else "messages"
    if first is not None:
        place.check_tokens(len(tokens), param)
        await first()
        began = time.perf_counter()
    place.take_tokens(len(tokens), param)
    message = Generate(
        new_id(),
        tenant,
        tokens,
        sampling(body, model, min(body.max_tokens, model.max_sequence - len(tokens))),
        deadline=deadline(body.timeout, services.settings),
        priority=body.priority,
        weight=weight_of(request),
    )
    output = Output(client.tokenizer, body, services.metrics, began)
    return Generation(request, client, message, output)


def sampling(body: GenerateBody, model: ModelInfo, max_tokens: int) -> Sampling:
    """What the caller asked for; the checkpoint's own defaults for the rest."""
    return Sampling(
        max_tokens=max_tokens,
        temperature=model.temperature if body.temperature is None else body.temperature,
        top_p=model.top_p if body.top_p is None else body.top_p,
        top_k=model.top_k if body.top_k is None else body.top_k,
        min_p=0.0 if body.min_p is None else body.min_p,
        repetition_penalty=(
            model.repetition_penalty if body.repetition_penalty is None else body.repetition_penalty
        ),
        seed=body.seed,
        logprobs=body.logprobs,
        stop_tokens=() if body.ignore_eos else model.stop_tokens,
    )


def deadline(timeout: float | None, settings: Settings) -> float:
    """Unix time at which the worker gives up: the caller's wish, within what the server allows."""
    return time.time() + min(timeout or settings.request_timeout, settings.request_timeout)


@dataclass
class Delta:
    """What one message of the worker adds."""

    text: str
    tokens: list[int]
    logprobs: list[TokenLogprob] | None


@dataclass(frozen=True)
class Generation:
    """One that may be sent, and what its answer is put together by. A client that goes away ends it."""

    request: Request
    client: WorkerClient
    message: Generate
    output: Output

    async def whole(self) -> Delta:
        """All of it, as one."""
        deltas: list[Delta] = []
        with self.client.open(self.message, place_of(self.request)) as stream:
            async with watched(self.request, stream):
                while self.output.finished is None:
                    deltas.append(self.output.take(await stream.next(), stream))
        wanted = self.message.sampling.logprobs is not None
        return Delta(
            "".join(delta.text for delta in deltas),
            [token for delta in deltas for token in delta.tokens],
            [item for delta in deltas for item in delta.logprobs or []] if wanted else None,
        )

    async def deltas(self) -> AsyncGenerator[Delta | None]:
        """As it comes; None for a stretch of silence. With the last one, ``output`` has finished."""
        with self.client.open(self.message, place_of(self.request)) as stream:
            stream.backlog = services_of(self.request).settings.stream_backlog
            async with watched(self.request, stream):
                async for part in parts(stream):
                    yield None if part is None else self.output.take(part, stream)


class Output:
    """Puts a generation together from the worker's messages, in the order they come.

    ``began`` is when the request came in, by ``time.perf_counter``.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, body: GenerateBody, metrics: Metrics, began: float
    ) -> None:
        self._tokenizer = tokenizer
        self._body = body
        self._metrics = metrics
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = StopStrings(body.stops)
        self._count = 0
        self._began, self._last = began, 0.0
        self.memory_version = 0
        self.finished: Finished | None = None

    def take(self, part: Part, stream: Stream) -> Delta:
        """What ``part`` adds. A stop string ends the text and cancels the rest of the generation."""
        if isinstance(part, Finished):
            return self._end(part)
        assert isinstance(part, Tokens)
        if part.memory_version is not None:
            self.memory_version = part.memory_version
        self._observe(len(part.tokens))
        text: list[str] = []
        taken = 0
        # what the worker had made before it heard of the stop string is not part of the answer
        tokens = [] if self._stops.found is not None else part.tokens
        for token in tokens:
            text.append(self._stops.push(self._detokenizer.push([token])))
            taken += 1
            if self._stops.found is not None:
                stream.cancel("stop")
                break
        self._count += taken
        logprobs = None
        if part.logprobs is not None and self._body.logprobs is not None:
            logprobs = [
                self._logprob(token, given)
                for token, given in zip(part.tokens[:taken], part.logprobs, strict=False)
            ]
        return Delta("".join(text), part.tokens[:taken], logprobs)

    def _end(self, part: Finished) -> Delta:
        self._metrics.whole.observe(time.perf_counter() - self._began)
        self.finished = part
        self.memory_version = part.memory_version
        if self._stops.found is not None:
            return Delta("", [], None)
        text = self._stops.push(self._detokenizer.end())
        return Delta(text + self._stops.end(), [], None)

    def summary(self) -> Summary:
        """How it ended. Only after ``finished`` is set."""
        assert self.finished is not None
        stopped = self._stops.found is not None
        completion = self._count if stopped else self.finished.completion_tokens
        return Summary(
            finish_reason="stop" if stopped else self.finished.reason,
            stop_reason=self._stops.found,
            usage=Usage(
                prompt_tokens=self.finished.prompt_tokens,
                completion_tokens=completion,
                total_tokens=self.finished.prompt_tokens + completion,
            ),
            memory_version=self.memory_version,
            timings=timings(self.finished.timings),
        )

    def _observe(self, tokens: int) -> None:
        now = time.perf_counter()
        gaps, each = tokens, (now - self._last) / max(1, tokens)
        if not self._last:
            self._metrics.first_token.observe(now - self._began)
            # what came together with the first token came at once
            gaps, each = tokens - 1, 0.0
        for _ in range(gaps):
            self._metrics.inter_token.observe(each)
        self._last = now

    def _logprob(self, token: int, given: WorkerLogprob) -> TokenLogprob:
        return TokenLogprob(
            token_id=token,
            token=self._word(token),
            logprob=given.logprob,
            top=[TopToken(token_id=id, token=self._word(id), logprob=value) for id, value in given.top],
        )

    def _word(self, token: int) -> str:
        return self._tokenizer.word(token) if self._tokenizer is not None else ""
