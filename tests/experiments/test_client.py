"""The client waits for a busy server, tries a lost connection again, and repeats nothing that would count twice."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from experiments import client
from experiments.client import Client

Handler = Callable[[httpx.Request], httpx.Response]


def play(handler: Handler, body: Callable[[Client], Awaitable[Any]], template: str | None = None) -> Any:
    async def run() -> Any:
        async with Client("http://server", 1, template) as talker:
            await talker._http.aclose()
            talker._plain = None
            talker._http = httpx.AsyncClient(transport=httpx.MockTransport(handler), base_url="http://server")
            return await body(talker)

    return asyncio.run(run())


def test_a_lost_connection_is_tried_again_with_the_same_key() -> None:
    keys = []

    def handler(request: httpx.Request) -> httpx.Response:
        keys.append(json.loads(request.content)["idempotency_key"])
        if len(keys) == 1:
            raise httpx.ReadError("", request=request)
        return httpx.Response(200, json={"memory_version": 1})

    assert play(handler, lambda talker: talker.update("t", "text")) == {"memory_version": 1}
    assert len(keys) == 2
    assert keys[0] == keys[1]
    play(handler, lambda talker: talker.update("t", "text"))
    assert keys[2] != keys[0]


def test_what_the_lost_try_had_made_is_made() -> None:
    tries = []

    def handler(request: httpx.Request) -> httpx.Response:
        tries.append(request)
        if len(tries) == 1:
            raise httpx.RemoteProtocolError("", request=request)
        return httpx.Response(409, json={"error": {"code": "tenant_exists"}})

    play(handler, lambda talker: talker.create("t", 1))
    with pytest.raises(httpx.HTTPStatusError):
        play(handler, lambda talker: talker.fork("t", "u"))


def test_only_that_it_is_there_counts_as_made() -> None:
    """A worker that died may have made the tenant before; another conflict says nothing of that."""
    for first in (503, None):
        for code in ("tenant_exists", "version_conflict"):
            answers = [first, httpx.Response(409, json={"error": {"code": code}})]

            def handler(request: httpx.Request, answers: list[Any] = answers) -> httpx.Response:
                answer = answers.pop(0)
                if answer is None:
                    raise httpx.ReadError("", request=request)
                return httpx.Response(answer, headers={"retry-after": "0"}) if answer == 503 else answer

            made = nullcontext() if code == "tenant_exists" else pytest.raises(httpx.HTTPStatusError)
            with made:
                play(handler, lambda talker: talker.create("t", 1))
    # who was only told to wait has made nothing
    held = [429, 409]
    with pytest.raises(httpx.HTTPStatusError):
        play(
            lambda _: httpx.Response(held.pop(0), json={"error": {"code": "tenant_exists"}}),
            lambda talker: talker.create("t", 1),
        )


class Clock:
    """Time that passes only where somebody waits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(client, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(client, "asyncio", SimpleNamespace(sleep=self.sleep))

    async def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize(
    ("error", "each", "least", "most"),
    # one that refuses for a minute; one that hangs as long as the client's own patience lasts, once
    [(httpx.ConnectError, 0.0, 60.0, 65.0), (httpx.ReadTimeout, client.PATIENCE, 600.0, 600.0)],
)
def test_a_server_that_is_not_there_is_not_waited_for_for_ever(
    monkeypatch: pytest.MonkeyPatch, error: type[httpx.TransportError], each: float, least: float, most: float
) -> None:
    clock = Clock(monkeypatch)

    def handler(request: httpx.Request) -> httpx.Response:
        clock.now += each
        raise error("", request=request)

    with pytest.raises(error):
        play(handler, lambda talker: talker.call("GET", "/ready", once=True))
    assert clock.now == each
    clock.now = 0.0
    with pytest.raises(error):
        play(handler, lambda talker: talker.call("GET", "/ready"))
    assert least <= clock.now <= most


def test_a_connection_that_breaks_late_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, tries = Clock(monkeypatch), []

    def handler(request: httpx.Request) -> httpx.Response:
        tries.append(request)
        if len(tries) == 1:
            clock.now += 400.0
            raise httpx.ReadError("", request=request)
        return httpx.Response(200, json={"text": "yes"})

    assert play(handler, lambda talker: talker.ask("t", "Who?")) == "yes"


@pytest.mark.parametrize(
    ("told", "waited"),
    [
        ("7", 7.0),
        ("0", client.SHORTEST),
        ("Sat, 28 Nov 2026 17:00:00 GMT", client.USUAL),
        ("inf", client.USUAL),
        (None, client.USUAL),
    ],
)
def test_a_busy_server_is_asked_again_when_it_says(
    monkeypatch: pytest.MonkeyPatch, told: str | None, waited: float
) -> None:
    clock = Clock(monkeypatch)
    headers = {} if told is None else {"retry-after": told}
    answers = [httpx.Response(429, headers=headers), httpx.Response(200, json={"text": " yes "})]
    assert play(lambda _: answers.pop(0), lambda talker: talker.ask("t", "Who?")) == "yes"
    assert clock.now == waited


def test_a_busy_server_is_not_waited_for_beyond_the_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    for pause, spent in (("86400", 0.0), ("250", 500.0)):
        clock.now = 0.0
        busy = httpx.Response(429, headers={"retry-after": pause}, text="later")
        with pytest.raises(httpx.HTTPStatusError, match="later"):
            play(lambda _, busy=busy: busy, lambda talker: talker.ask("t", "Who?"))  # type: ignore[misc]
        assert clock.now == spent


def test_a_template_is_filled() -> None:
    sent = []

    def handler(request: httpx.Request) -> httpx.Response:
        sent.append(json.loads(request.content))
        return httpx.Response(200, json={"text": ""})

    for template in ("Question: {question} Answer:", None):
        play(handler, lambda talker: talker.ask("t", "Who?", 4, before="Ann."), template)
    assert sent[0]["prompt"] == "Ann.\nQuestion: Who? Answer:"
    # without a chat template a model goes on with a question of its own
    assert sent[0]["stop"] == ["\n"]
    assert "stop" not in sent[1]
    assert sent[1]["messages"] == [{"role": "user", "content": "Ann. Who?"}]


def test_what_a_plain_request_carries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(client.KEY_VARIABLE, "mllm-1")
    heads: list[bytes] = []
    bodies: list[Any] = []
    answers = [
        b"HTTP/1.1 429 Busy\r\nRetry-After: 0\r\nContent-Length: 0\r\n\r\n",
        b'HTTP/1.1 200 OK\r\nContent-Length: 24\r\n\r\n{"text": " caf\xc3\xa9 oder "}',
        b"HTTP/1.1 404 Not Found\r\nContent-Length: 4\r\n\r\nnone",
    ]

    async def served(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while answers:
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0] or 0)
            heads.append(head)
            bodies.append(json.loads(await reader.readexactly(length) or b"null"))
            writer.write(answers.pop(0))
        writer.close()

    async def run() -> None:
        server = await asyncio.start_server(served, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with Client(f"{url}/base/", 1) as talker:
            assert await talker.ask("café", "Wo?", 4) == "café oder"
            with pytest.raises(httpx.HTTPStatusError, match="none") as failed:
                await talker.call("GET", "/tenants/a%2Fb?limit=1")
            assert (failed.value.response.status_code, failed.value.request.url.path) == (
                404,
                "/base/tenants/a/b",
            )
        server.close()

    asyncio.run(run())
    assert [head.split(b" HTTP")[0] for head in heads] == [
        b"POST /base/generate",
        b"POST /base/generate",
        b"GET /base/tenants/a%2Fb?limit=1",
    ]
    assert all(b"\r\nauthorization: bearer mllm-1\r\n" in head.lower() for head in heads)
    assert b"\r\ncontent-type: application/json\r\n" in heads[0]
    assert bodies[0] == bodies[1]
    assert bodies[0]["tenant"] == "café"
    assert bodies[2] is None
