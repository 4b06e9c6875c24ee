"""``remember`` of a chat: the text is durable before the answer is generated, or nothing is generated."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from app.api.tokens import Tokenizer
from app.messages import Generate, Timings, Update, Updated
from tests.api.conftest import Service
from tests.api.fake_worker import MAX_SEQUENCE, MIN_CONTEXT, NUM_TOKENS
from tests.api.test_access import bearer
from tests.api.test_admission import admission, bounded
from tests.api.test_bad_input import SECRET, check_error
from tests.api.test_openai import ASK, CHAT, GO_ON, TEXT, chunks, guarded
from tests.api.test_update import LONG
from tests.api.test_update import TEXT as NOTE

pytestmark = pytest.mark.anyio

__all__ = ["guarded"]

KEY = {"idempotency-key": "note-17"}


async def told(service: Service, remember: Any, headers: Any = KEY, **more: Any) -> Any:
    return await service.post(CHAT, {**ASK, **more, "remember": remember}, headers=headers)


async def test_a_text_is_remembered_before_the_answer(service: Service, tokenizer: Tokenizer) -> None:
    answer = await told(service, LONG)
    assert answer.status_code == 200, answer.text
    update, generate = service.seen
    assert isinstance(update, Update)
    assert isinstance(generate, Generate)
    assert (update.tenant, update.idempotency_key) == ("alice", "note-17")
    assert "".join(context.text or "" for context in update.contexts) == LONG
    assert answer.json()["memory_version"] == len(update.contexts) > 1
    # the same once more is taught once
    again = await told(service, LONG)
    assert again.json()["memory_version"] == len(update.contexts)
    assert [type(message) for message in service.seen] == [Update, Generate] * 2


async def test_nothing_is_generated_before_the_text_is_durable(service: Service) -> None:
    call = asyncio.create_task(told(service, NOTE, user="hold-1"))
    update = await service.until_seen(Update)
    assert isinstance(update, Update)
    for _ in range(50):
        await asyncio.sleep(0)
    assert service.seen == [update]
    service.answer(Updated(update.id, 1, 1, 10, 1.0, Timings()))
    await service.until_seen(Generate)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)


async def test_a_stream_shows_the_new_version(service: Service) -> None:
    response = await told(service, NOTE, stream=True)
    assert response.status_code == 200
    assert '"memory_version":1' in response.text
    # without it a chat is as it was, whatever header comes with it
    assert (await chunks(service, CHAT))[-1]["memory_version"] == 1
    for key in ("", "x" * 300):
        answer = await service.post(CHAT, ASK, headers={"idempotency-key": key})
        assert answer.json()["memory_version"] == 1
    assert sum(isinstance(message, Update) for message in service.seen) == 1


async def test_a_short_text_is_treated_as_it_says(service: Service, tokenizer: Tokenizer) -> None:
    check_error(await told(service, "Hm"), 422, "context_too_short", "remember")
    assert service.seen == []
    # one that is long enough, and shorter than a block
    few = tokenizer.decode(tokenizer.ids(NOTE)[: NUM_TOKENS - 2])
    assert MIN_CONTEXT <= len(tokenizer.ids(few)) < NUM_TOKENS
    sizes = []
    for number, (text, short) in enumerate([("Hm", "repeat"), (few, "repeat"), (few, "fill")]):
        answer = await told(service, {"text": text, "short": short}, {"idempotency-key": f"{number}"})
        assert answer.status_code == 200, answer.text
        update = service.seen[-2]
        assert isinstance(update, Update)
        sizes.append(len(update.contexts[0].tokens))
    assert sizes[0] >= MIN_CONTEXT
    assert sizes[1] == len(tokenizer.ids(few)) < NUM_TOKENS <= sizes[2]


@pytest.mark.parametrize(
    ("tenant", "status", "code"),
    [("full", 507, "store_full"), ("full-later", 507, "store_full"), ("busy", 429, "tenant_queue_full")],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_an_update_that_fails_is_the_answer(
    service: Service, tenant: str, status: int, code: str, stream: bool
) -> None:
    check_error(await told(service, LONG, user=tenant, stream=stream), status, code)
    assert [type(message) for message in service.seen] == [Update]


@pytest.mark.parametrize(
    ("remember", "headers", "param"),
    [
        (NOTE, {}, "Idempotency-Key"),
        (NOTE, {"idempotency-key": ""}, "Idempotency-Key"),
        (NOTE, {"idempotency-key": SECRET * 50}, "Idempotency-Key"),
        (NOTE, {"idempotency-key": b"\xff"}, "Idempotency-Key"),
        (NOTE, {"idempotency-key": f"server-made:{SECRET}"}, "Idempotency-Key"),
        ("", KEY, "remember"),
        (5, KEY, "remember"),
        (f"{SECRET}\0", KEY, "remember"),
        ({"text": NOTE, SECRET: 1}, KEY, "remember"),
        ({"short": "repeat"}, KEY, "remember.text"),
        ({"text": NOTE, "short": SECRET}, KEY, "remember.short"),
    ],
)
async def test_what_is_wrong_teaches_nothing(
    service: Service, remember: Any, headers: dict[str, Any], param: str
) -> None:
    check_error(await told(service, remember, headers), 422, "invalid_request", param)
    assert service.seen == []


async def test_a_chat_that_cannot_be_answered_teaches_nothing(service: Service) -> None:
    long = [{"role": "user", "content": "a" * 10 * MAX_SEQUENCE}]
    check_error(await told(service, NOTE, messages=long), 400, "context_length_exceeded", "messages")
    check_error(await told(service, NOTE, model="another"), 404, "model_not_found")
    check_error(await service.post(TEXT, {**GO_ON, "remember": NOTE}, headers=KEY), 422, param="remember")
    assert service.seen == []


async def test_nor_does_one_that_can_never_wait_for_its_turn(model_dir: Path, tokenizer: Tokenizer) -> None:
    async with bounded(model_dir, queue_tokens_tenant=len(tokenizer.ids(NOTE))) as service:
        refused = await told(service, NOTE, messages=[{"role": "user", "content": LONG}])
        check_error(refused, 422, "too_many_tokens", "messages")
        assert service.seen == []


async def test_it_is_held_to_the_key_s_tenants(guarded: Service) -> None:
    answer = await told(guarded, NOTE, KEY | bearer("ada"), user="bob")
    assert answer.status_code == 200
    assert {message.tenant for message in guarded.seen if isinstance(message, Update | Generate)} == {"ada"}
    refused = await told(guarded, NOTE, KEY | bearer("ada") | {"x-tenant": "bob"})
    check_error(refused, 404, "tenant_not_found")


async def test_text_and_prompt_wait_one_after_the_other(model_dir: Path, tokenizer: Tokenizer) -> None:
    """Each has room alone, and both together have not; in the end all is given back."""
    room = len(tokenizer.ids(LONG)) * 3 // 2
    async with bounded(model_dir, queue_tokens_tenant=room) as service:
        answer = await told(service, LONG, messages=[{"role": "user", "content": LONG}])
        assert answer.status_code == 200, answer.text
        assert admission(service).server.tokens.used == 0
        assert not admission(service).tenants
