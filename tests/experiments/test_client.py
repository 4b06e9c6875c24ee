"""The client waits for a busy server, tries a lost connection again, and repeats nothing that would count twice."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
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


def test_a_server_that_is_not_there_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    monkeypatch.setattr(client, "UNREACHED", 1.0)
    for once in (True, False):
        with pytest.raises(httpx.ConnectError):
            play(handler, lambda talker, once=once: talker.call("GET", "/ready", once=once))  # type: ignore[misc]


def test_a_busy_server_is_asked_again_when_it_says() -> None:
    answers = [httpx.Response(429, headers={"retry-after": "0"}), httpx.Response(200, json={"text": " yes "})]
    assert play(lambda _: answers.pop(0), lambda talker: talker.ask("t", "Who?")) == "yes"


def test_a_template_is_filled() -> None:
    sent = []

    def handler(request: httpx.Request) -> httpx.Response:
        sent.append(json.loads(request.content))
        return httpx.Response(200, json={"text": ""})

    for template in ("Question: {question} Answer:", None):
        play(handler, lambda talker: talker.ask("t", "Who?", 4, before="Ann."), template)
    assert sent[0]["prompt"] == "Ann.\nQuestion: Who? Answer:"
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
