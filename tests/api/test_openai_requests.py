"""OpenAI's protocol is bounded, logged, streamed and ended as every other request is."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from starlette.responses import Response

from app.api import generate, streaming
from app.api.middleware import tenant_mark
from app.api.openai import routes
from app.api.openai.schemas import MAX_PARTS
from app.api.tokens import Tokenizer
from app.messages import Cancel, Finished, Generate, Timings, TokenLogprob, Tokens
from tests.api.conftest import Service, until
from tests.api.fake_worker import EOS
from tests.api.test_access import bearer
from tests.api.test_admission import bounded, check_refused, ended, hold
from tests.api.test_bad_input import JSON, MB8, SECRET, check_error
from tests.api.test_generate import read_body
from tests.api.test_logs import read, talkative
from tests.api.test_openai import ASK, BODIES, CHAT, TEXT, ask, chunks, guarded
from tests.api.test_update import events

pytestmark = pytest.mark.anyio

__all__ = ["guarded"]


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_errors_of_the_worker(service: Service, path: str) -> None:
    for tenant, status, code in (
        ("busy", 429, "tenant_queue_full"),
        ("overloaded", 503, "server_overloaded"),
    ):
        for stream in (False, True):
            refused = await service.post(path, {**BODIES[path], "user": tenant, "stream": stream})
            check_refused(refused, status, code)


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("by", ["header", "user"])
async def test_a_full_tenant_is_refused_before_the_request_is_looked_at(
    model_dir: Path, path: str, by: str
) -> None:
    async with bounded(model_dir, queue_requests_tenant=1) as service:
        call = hold(service, "mute")
        await service.until_seen(Generate)
        body = {"user": "mute" if by == "user" else "ann", "temperature": -1}
        headers = {"x-tenant": "mute"} if by == "header" else {}
        refused = await service.post(path, body, headers=headers)
        check_refused(refused, 429, "tenant_queue_full")
        check_error(await service.post(path, {**body, "user": "ann"}), 422)
        await ended(call)


async def test_a_full_tenant_of_a_key_is_refused_before_the_request_is_looked_at(guarded: Service) -> None:
    first = asyncio.create_task(guarded.post(CHAT, ASK, headers=bearer("slow")))
    await guarded.until_seen(Generate)
    second = asyncio.create_task(guarded.post(CHAT, ASK, headers=bearer("slow")))
    await guarded.until_seen(Generate, 2)
    refused = await guarded.post(CHAT, ASK, headers=bearer("slow"))
    check_error(refused, 429, "quota_exceeded")
    await ended(first, second)


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_the_log_has_a_mark_of_the_tenant_alone(
    service: Service, capsys: pytest.CaptureFixture[str], path: str
) -> None:
    talkative()
    await service.post(path, {**BODIES[path], "user": SECRET})
    await service.post(path, BODIES[path], headers={"x-tenant": SECRET})
    told = read(capsys)
    assert [line["tenant"] for line in told] == [tenant_mark(SECRET)] * 2
    assert {line["route"] for line in told} == {path}


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_a_stop_string_ends_the_work(service: Service, path: str) -> None:
    answer = await ask(service, path, stop="cello", max_tokens=60)
    assert answer["choices"][0]["finish_reason"] == "stop"
    await until(lambda: any(isinstance(message, Cancel) for message in service.seen))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_a_client_that_goes_away_ends_the_generation(
    service: Service, tokenizer: Tokenizer, path: str, stream: bool
) -> None:
    call, gone, out = await read_body(service, {**BODIES[path], "user": "mute", "stream": stream}, path)
    message = await service.until_seen(Generate)
    assert isinstance(message, Generate)
    if stream:
        service.answer(Tokens(message.id, tokenizer.ids("Maya"), None, 0))
        await until(lambda: len(out) > 1)
    gone.set()
    cancel = await service.until_seen(Cancel)
    assert isinstance(cancel, Cancel)
    assert cancel.id == message.id
    await asyncio.wait_for(call, 10)
    assert service.client.open_requests == 0


@pytest.mark.parametrize(
    ("module", "path", "body"),
    [(generate, "/generate", {"tenant": "mute", "prompt": "x"}), (routes, CHAT, ASK | {"user": "mute"})],
    ids=["generate", "chat"],
)
async def test_a_stream_that_is_closed_has_ended_its_request(
    service: Service, monkeypatch: pytest.MonkeyPatch, module: ModuleType, path: str, body: dict[str, Any]
) -> None:
    """At once, and not when what it was made of is collected."""
    made: list[AsyncGenerator[bytes]] = []

    def kept(events: AsyncGenerator[bytes]) -> Response:
        made.append(events)
        return Response()

    @asynccontextmanager
    async def nobody(*_: object) -> AsyncIterator[None]:
        yield

    monkeypatch.setattr(module, "EventStream", kept)
    monkeypatch.setattr(generate, "watched", nobody)
    monkeypatch.setattr(streaming, "FIRST_ANSWER_SECONDS", 0.0)
    await service.post(path, {**body, "stream": True})
    (events,) = made
    assert (await anext(events)).startswith(b":")
    assert service.client.open_requests == 1
    await events.aclose()
    assert service.client.open_requests == 0


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_an_error_in_a_stream_is_an_event(service: Service, tokenizer: Tokenizer, path: str) -> None:
    call, _, out = await read_body(service, {**BODIES[path], "user": "mute", "stream": True}, path)
    message = await service.until_seen(Generate)
    assert isinstance(message, Generate)
    service.answer(Tokens(message.id, tokenizer.ids("Maya"), None, 0))
    await until(lambda: len(out) > 1)
    service.client.detach("the worker ended with exit code 9")
    await asyncio.wait_for(call, 10)
    told = events(b"".join(message.get("body", b"") for message in out).decode())
    assert told[-1][0] == "error"
    assert told[-1][1]["error"]["code"] == "worker_unavailable"


async def test_an_answer_without_text_is_still_somebodys_turn(service: Service) -> None:
    call, _, out = await read_body(service, {**ASK, "user": "mute", "stream": True}, CHAT)
    message = await service.until_seen(Generate)
    assert isinstance(message, Generate)
    service.answer(Finished(message.id, "stop", 0, 5, 0, Timings(), EOS))
    await asyncio.wait_for(call, 10)
    (chunk, done) = events(b"".join(message.get("body", b"") for message in out).decode())
    (choice,) = chunk[1]["choices"]
    assert choice["delta"] == {"role": "assistant", "content": ""}
    assert choice["finish_reason"] == "stop"
    assert done[1] == "[DONE]"


async def test_a_stream_gives_each_token_as_it_comes(service: Service, tokenizer: Tokenizer) -> None:
    call, _, out = await read_body(service, {**ASK, "user": "mute", "stream": True}, CHAT)
    message = await service.until_seen(Generate)
    assert isinstance(message, Generate)

    def text() -> str:
        told = events(b"".join(message.get("body", b"") for message in out).decode())
        return "".join(data["choices"][0]["delta"].get("content", "") for _, data in told)

    shown = ""
    for place, token in enumerate(tokenizer.ids("Maya lives")):
        service.answer(Tokens(message.id, [token], None, 0 if place == 0 else None))
        shown += tokenizer.decode([token])
        await until(lambda wanted=shown: text() == wanted)  # type: ignore[misc]
    service.answer(Finished(message.id, "length", 0, 5, 3, Timings()))
    await asyncio.wait_for(call, 10)


async def test_a_token_without_text_has_its_logprobs_streamed(service: Service, tokenizer: Tokenizer) -> None:
    """As the first bytes of a character have, which is shown when it is whole."""
    call, _, out = await read_body(service, {**ASK, "user": "mute", "stream": True, "logprobs": True}, CHAT)
    message = await service.until_seen(Generate)
    assert isinstance(message, Generate)

    def told() -> int:
        chunks = events(b"".join(message.get("body", b"") for message in out).decode())
        return sum(len((data["choices"][0]["logprobs"] or {}).get("content", [])) for _, data in chunks)

    tokens = tokenizer.ids("東")
    assert len(tokens) > 1
    for place, token in enumerate(tokens):
        service.answer(Tokens(message.id, [token], [TokenLogprob(-0.5, [])], 0 if place == 0 else None))
        await until(lambda wanted=place + 1: told() == wanted)  # type: ignore[misc]
    service.answer(Finished(message.id, "length", 0, 5, len(tokens), Timings()))
    await asyncio.wait_for(call, 10)


async def test_parts_are_counted_before_they_are_looked_at(service: Service) -> None:
    """Each is a model of its own: as many as a body holds would take the loop a second and more."""
    part = {"type": "text", "text": ""}
    fits = {"role": "user", "content": [part] * (MAX_PARTS // 2)}
    # as far as their number goes: the line breaks between so many are more tokens than there may be
    check_error(await service.post(CHAT, {**ASK, "messages": [fits, fits]}), 400, "context_length_exceeded")
    refused = await service.post(CHAT, {**ASK, "messages": [fits, fits, {"role": SECRET, "content": [part]}]})
    check_error(refused, 422, "invalid_request", "messages")
    assert "parts" in refused.json()["error"]["message"]


@pytest.mark.parametrize("field", ["metadata", "logit_bias"])
async def test_entries_are_counted_before_they_are_looked_at(service: Service, field: str) -> None:
    entries = {f"{SECRET}{number}": number for number in range(17)}
    refused = await service.post(CHAT, {**ASK, field: entries})
    check_error(refused, 422, "invalid_request", field)


@pytest.mark.parametrize(
    "body",
    [
        b'{"user":"a","messages":[{"role":"user","content":[' + b"1," * 4_000_000 + b"1]}]}",
        b'{"user":"a","messages":[{"role":"user","content":"x","tool_calls":[' + b"1," * 4_000_000 + b"1]}]}",
        b'{"user":"a","messages":[{"role":"user","content":"x"}],"metadata":{'
        + b",".join(b'"%d":1' % i for i in range(600_000))
        + b"}}",
        b'{"user":"a","messages":[{"role":"user","content":"x"}],"modalities":[' + b"1," * 4_000_000 + b"1]}",
        b'{"user":"a",' + b",".join(b'"%d":null' % i for i in range(500_000)) + b"}",
    ],
    ids=lambda body: f"{body[:40]!r}-{len(body)}",
)
async def test_large_and_wrong(service: Service, body: bytes) -> None:
    check_error(await service.http.post(CHAT, content=body, headers=JSON), 422)
    assert service.seen == []


async def test_large_and_too_long(service: Service) -> None:
    body = {**ASK, "messages": [{"role": "user", "content": "a" * (MB8 - 200)}]}
    check_error(await service.post(CHAT, body), 400, "context_length_exceeded", "messages")
    assert service.seen == []


async def test_many_logprobs_are_one_answer(service: Service) -> None:
    more: dict[str, Any] = {"logprobs": True, "top_logprobs": 20, "max_tokens": 300}
    whole = await ask(service, CHAT, **more)
    assert len(whole["choices"][0]["logprobs"]["content"]) == 300
    told = await chunks(service, CHAT, **more)
    joined = [item for chunk in told for item in (chunk["choices"][0]["logprobs"] or {}).get("content", [])]
    assert json.dumps(joined) == json.dumps(whole["choices"][0]["logprobs"]["content"])
