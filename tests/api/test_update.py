"""POST /update: what reaches the worker, what comes back, and who may retry."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from app.api.tokens import Tokenizer
from app.messages import Timings, Update, Updated, UpdateProgress
from tests.api.conftest import Service
from tests.api.fake_worker import MAX_CONTEXT, MIN_CONTEXT, NUM_TOKENS
from tests.api.test_bad_input import check_error

pytestmark = pytest.mark.anyio

TEXT = "Maya moved to Lisbon in March. She teaches the cello there."
LONG = "Maya moved to Lisbon in March. " * 12


def events(text: str) -> list[tuple[str, Any]]:
    """Names and data of server-sent events."""
    out = []
    for block in text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if lines:
            data = lines["data"]
            out.append((lines.get("event", ""), data if data == "[DONE]" else json.loads(data)))
    return out


async def test_answer(service: Service, tokenizer: Tokenizer) -> None:
    response = await service.post("/update", {"tenant": "alice", "text": LONG})
    assert response.status_code == 200
    (sent,) = service.seen
    assert isinstance(sent, Update)
    assert sent.tenant == "alice"
    assert "".join(context.text or "" for context in sent.contexts) == LONG
    assert all(len(context.tokens) <= MAX_CONTEXT for context in sent.contexts)
    assert len(sent.contexts) > 1
    assert response.json() == {
        "tenant": "alice",
        "memory_version": len(sent.contexts),
        "blocks": len(sent.contexts),
        "tokens": sum(len(context.tokens) for context in sent.contexts),
        "surviving_share": 0.75,
        "timings": {"queue": 0.0, "load": 0.0, "total": 0.01},
        "replayed": False,
        "short": "none",
    }


async def test_one_text_is_one_context(service: Service, tokenizer: Tokenizer) -> None:
    text = "Maya teaches."
    await service.post("/update", {"tenant": "alice", "text": text})
    (sent,) = service.seen
    assert isinstance(sent, Update)
    assert [(c.text, c.tokens) for c in sent.contexts] == [(text, tokenizer.ids(text))]


async def test_token_ids(bare: Service) -> None:
    response = await bare.post("/update", {"tenant": "alice", "text": list(range(100))})
    assert response.json()["blocks"] == 4
    (sent,) = bare.seen
    assert isinstance(sent, Update)
    assert [token for context in sent.contexts for token in context.tokens] == list(range(100))
    assert all(context.text is None for context in sent.contexts)


async def test_messages_are_put_into_the_chat_format(service: Service, tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "I live in Lisbon."}, {"role": "assistant", "content": "Good."}]
    await service.post("/update", {"tenant": "alice", "messages": messages})
    (sent,) = service.seen
    assert isinstance(sent, Update)
    # no BOS, and no opened turn at the end
    assert sent.contexts[0].text == "<|user|>I live in Lisbon.\n<|assistant|>Good.\n"
    assert sent.contexts[0].tokens[0] == 3


@pytest.mark.parametrize("text", ["Maya", [7, 8]])
async def test_short_text_repeated(service: Service, text: str | list[int]) -> None:
    response = await service.post("/update", {"tenant": "alice", "text": text, "short": "repeat"})
    assert response.json()["short"] == "repeated"
    (sent,) = service.seen
    assert isinstance(sent, Update)
    assert len(sent.contexts) == 1
    assert NUM_TOKENS <= len(sent.contexts[0].tokens) <= MAX_CONTEXT


@pytest.mark.parametrize("short", ["repeat", "fill"])
async def test_long_text_is_not_repeated(service: Service, short: str) -> None:
    response = await service.post("/update", {"tenant": "alice", "text": TEXT, "short": short})
    assert response.json()["short"] == "none"


@pytest.mark.parametrize("text", ["Maya sings.", [7, 8, 9, 10, 11]])
async def test_text_shorter_than_a_block_is_repeated_only_to_fill_it(
    service: Service, tokenizer: Tokenizer, text: str | list[int]
) -> None:
    tokens = tokenizer.ids(text) if isinstance(text, str) else text
    assert MIN_CONTEXT <= len(tokens) < NUM_TOKENS
    lengths = []
    for short, told in (("refuse", "none"), ("repeat", "none"), ("fill", "repeated")):
        response = await service.post("/update", {"tenant": "alice", "text": text, "short": short})
        assert response.json()["short"] == told
        sent = service.seen[-1]
        assert isinstance(sent, Update)
        (context,) = sent.contexts
        assert context.tokens[: len(tokens)] == tokens
        lengths.append(len(context.tokens))
    assert lengths[:2] == [len(tokens)] * 2
    assert NUM_TOKENS <= lengths[2] <= MAX_CONTEXT


@pytest.mark.parametrize("in_header", [True, False])
async def test_idempotency_key(service: Service, in_header: bool) -> None:
    body = {"tenant": "alice", "text": TEXT}
    headers = {"Idempotency-Key": "k1"} if in_header else {}
    body |= {} if in_header else {"idempotency_key": "k1"}
    first = await service.post("/update", body, headers=headers)
    again = await service.post("/update", body, headers=headers)
    assert [sent.idempotency_key for sent in service.seen if isinstance(sent, Update)] == ["k1", "k1"]
    assert first.json()["replayed"] is False
    assert again.json() == {**first.json(), "replayed": True}


async def test_a_key_is_the_same_in_header_and_body(service: Service) -> None:
    key = "Schlüssel 鍵"
    headers = {"Idempotency-Key": key.encode()}
    first = await service.post("/update", {"tenant": "alice", "text": TEXT}, headers=headers)
    body = {"tenant": "alice", "text": TEXT, "idempotency_key": key}
    for more in ({}, headers):
        again = await service.post("/update", body, headers=more)
        assert again.json() == {**first.json(), "replayed": True}
    assert [sent.idempotency_key for sent in service.seen if isinstance(sent, Update)] == [key] * 3


@pytest.mark.parametrize(
    ("key", "reason"),
    [("Schlüssel".encode("latin-1"), "not UTF-8"), ("ü".encode() * 257, "256"), (b"", "1 character")],
    ids=["latin-1", "long", "empty"],
)
async def test_a_header_that_is_no_key(service: Service, key: bytes, reason: str) -> None:
    headers = {"Idempotency-Key": key}
    answer = await service.post("/update", {"tenant": "alice", "text": TEXT}, headers=headers)
    check_error(answer, 422, "invalid_request")
    assert reason in answer.json()["error"]["message"]
    assert service.seen == []
    longest = {"Idempotency-Key": "ü".encode() * 256}
    taken = await service.post("/update", {"tenant": "alice", "text": TEXT}, headers=longest)
    assert taken.status_code == 200


async def test_idempotency_keys_that_differ(service: Service) -> None:
    body = {"tenant": "alice", "text": TEXT, "idempotency_key": "k1"}
    same = await service.post("/update", body, headers={"Idempotency-Key": "k1"})
    assert same.status_code == 200
    del service.seen[:]
    differ = await service.post("/update", body, headers={"Idempotency-Key": "k2"})
    check_error(differ, 422, "invalid_request", "idempotency_key")
    assert service.seen == []


async def test_stream(service: Service) -> None:
    response = await service.post("/update", {"tenant": "alice", "text": LONG, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    told = events(response.text)
    total = told[-1][1]["blocks"]
    assert [name for name, _ in told] == ["progress"] * total + ["done"]
    assert told[0][1] == {"done": 1, "total": total, "memory_version": 1}
    whole = await service.post("/update", {"tenant": "bob", "text": LONG})
    assert {**told[-1][1], "tenant": "bob"} == whole.json()


async def test_error_before_the_stream_has_its_status(service: Service) -> None:
    response = await service.post("/update", {"tenant": "full", "text": LONG, "stream": True})
    check_error(response, 507, "store_full")


async def test_error_in_the_stream_is_an_event(service: Service) -> None:
    response = await service.post("/update", {"tenant": "full-later", "text": LONG, "stream": True})
    assert response.status_code == 200
    told = events(response.text)
    assert [name for name, _ in told] == ["progress", "error"]
    assert told[-1][1]["error"]["code"] == "store_full"
    assert told[-1][1]["request_id"] == response.headers["x-request-id"]


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_goes_does_not_stop_it(service: Service, stream: bool) -> None:
    call = asyncio.create_task(service.post("/update", {"tenant": "hold", "text": LONG, "stream": stream}))
    sent = await service.until_seen(Update)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    assert isinstance(sent, Update)
    # the worker goes on, and nobody listens
    service.answer(UpdateProgress(sent.id, 1, 1, 1), Updated(sent.id, 1, 1, 9, 1.0, Timings()))
    assert service.client.open_requests == 0
    assert service.seen == [sent]


@pytest.mark.parametrize(
    ("tenant", "status", "code", "retry_after"),
    [
        ("busy", 429, "tenant_queue_full", "2"),
        ("overloaded", 503, "server_overloaded", "3"),
        ("full", 507, "store_full", None),
    ],
)
async def test_errors_of_the_worker(
    service: Service, tenant: str, status: int, code: str, retry_after: str | None
) -> None:
    response = await service.post("/update", {"tenant": tenant, "text": TEXT})
    check_error(response, status, code)
    assert response.headers.get("retry-after") == retry_after
