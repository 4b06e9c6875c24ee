"""The little of the HTTP API that experiments need, asynchronous, with retries where the server asks for them."""

from __future__ import annotations

import asyncio
import json
import math
import os
import secrets
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from urllib.parse import quote

import httpx

from experiments.transport import PlainAnswer, Transport

BUSY = {429, 503}
PATIENCE = 600.0
UNREACHED = 60.0
SHORTEST, USUAL = 0.1, 1.0  # pauses before a busy server is asked again: at least, and if it does not say
EXISTS = "tenant_exists"
STOP = ["\n"]
KEY_VARIABLE = "MEMORYLLM_API_KEY"


@dataclass(frozen=True)
class Scores:
    """Per token of a continuation: its natural-log probability, whether it is the likeliest, the likeliest's id."""

    logprobs: list[float]
    greedy: list[bool]
    first: list[int]


def pause_of(field: bytes | None) -> float:
    """The seconds that a ``Retry-After`` asks for; of one that is none, or a date, the usual ones."""
    try:
        seconds = float(field or b"")
    except ValueError:
        return USUAL
    return max(SHORTEST, seconds) if math.isfinite(seconds) else USUAL


def is_there(response: httpx.Response) -> bool:
    """It says that the tenant exists already."""
    try:
        return response.status_code == httpx.codes.CONFLICT and response.json()["error"]["code"] == EXISTS
    except (ValueError, KeyError, TypeError):
        return False


class Client:
    """Talks to a running ``memoryllm serve``. An API key is taken from ``MEMORYLLM_API_KEY``.

    ``template`` holds ``{question}`` and is how questions are put to a model that has no chat template, which would go
    on with a question of its own: its answer ends with the line. Without one they are chat messages.
    """

    def __init__(self, url: str, connections: int, template: str | None = None) -> None:
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        key = os.environ.get(KEY_VARIABLE)
        self._plain = Transport(connections, PATIENCE) if url.startswith("http://") else None
        self._http = httpx.AsyncClient(
            base_url=url,
            timeout=PATIENCE,
            limits=limits,
            transport=self._plain,
            trust_env=False,
            # what comes back is read as it is
            headers={"accept-encoding": "identity"} | ({"authorization": f"Bearer {key}"} if key else {}),
        )
        # what a request begins with; httpx takes a millisecond to put it together each time
        base = httpx.Request("GET", self._http.base_url, headers=self._http.headers)
        self._fields = b"".join([b"%s: %s\r\n" % header for header in base.headers.raw])
        self.template = template

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def call(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        made: bool = False,
        once: bool = False,
    ) -> dict[str, Any]:
        """Raises httpx.HTTPStatusError with the server's message for any answer but a success.

        A busy server is asked again when it says, unless that is later than ten minutes behind the first try; one that
        cannot be reached or hangs up, for a minute, unless ``once``; one that does not answer at all is given up
        after the ten minutes. What is sent must therefore do no harm when it comes twice; with ``made`` an answer that
        the tenant exists already is none after a try that may have made it.
        """
        begin = time.monotonic()
        failing: float | None = None
        maybe = False
        while True:
            try:
                answer = await self._ask(method, path, body)
            except httpx.TransportError:
                now = time.monotonic()
                # a connection that was closed while idle needs only a new one; a restart takes seconds
                pause = 0.0 if failing is None else max(0.5, min(now - failing, 5.0))
                failing = now if failing is None else failing
                if once or now - failing >= UNREACHED or now - begin >= PATIENCE:
                    raise
                maybe = True
                await asyncio.sleep(pause)
                continue
            failing = None
            pause = pause_of(answer.field(b"retry-after"))
            if answer.status not in BUSY or time.monotonic() - begin + pause > PATIENCE:
                break
            # a worker that died may have done it before
            maybe = maybe or answer.status == httpx.codes.SERVICE_UNAVAILABLE
            await asyncio.sleep(pause)
        if answer.status >= 400:
            request = self._http.build_request(method, path)
            response = httpx.Response(
                answer.status, headers=answer.fields, content=answer.content, request=request
            )
            if made and maybe and is_there(response):
                return {}
            raise httpx.HTTPStatusError(response.text, request=request, response=response)
        told: dict[str, Any] = json.loads(answer.content)
        return told

    async def _ask(self, method: str, path: str, body: dict[str, Any] | None) -> PlainAnswer:
        """Asks once. Raises httpx.TransportError."""
        if self._plain is None:
            response = await self._http.request(method, path, json=body)
            fields = [(name.lower(), value) for name, value in response.headers.raw]
            return PlainAnswer(response.status_code, fields, response.content)
        base, content, head = self._http.base_url, b"", self._fields
        if body is not None:
            content = json.dumps(body, ensure_ascii=False).encode()
            head += b"content-type: application/json\r\ncontent-length: %d\r\n" % len(content)
        target = base.raw_path.rstrip(b"/") + path.encode("ascii")
        return await self._plain.exchange(base, method, target, head, content)

    async def update(
        self, tenant: str, text: str, short: str = "refuse", key: str | None = None
    ) -> dict[str, Any]:
        """``key`` makes a repetition harmless beyond this call; without one it is so within it."""
        body = {
            "tenant": tenant,
            "text": text,
            "short": short,
            "idempotency_key": key or secrets.token_hex(8),
        }
        return await self.call("POST", "/update", body)

    def asked(self, question: str) -> str:
        """The prompt that puts a question, as far as it is ours: without the model's own chat template."""
        return question if self.template is None else self.template.replace("{question}", question)

    async def ask(self, tenant: str, question: str, max_tokens: int = 32, before: str = "") -> str:
        """The greedy answer to a question, without white space around it; ``before`` is text ahead of it."""
        body: dict[str, Any] = {"tenant": tenant, "max_tokens": max_tokens, "temperature": 0.0}
        if self.template is None:
            content = f"{before} {question}" if before else question
            body["messages"] = [{"role": "user", "content": content}]
        else:
            asked = self.asked(question)
            body["prompt"] = f"{before}\n{asked}" if before else asked
            body["stop"] = STOP
        answer = await self.call("POST", "/generate", body)
        return str(answer["text"]).strip()

    async def score(self, tenant: str, prompt: str, continuation: str) -> Scores:
        body = {"tenant": tenant, "prompt": prompt, "continuation": continuation}
        answer = await self.call("POST", "/score", body)
        return Scores(answer["logprobs"], answer["greedy"], answer["greedy_token_ids"])

    async def create(self, tenant: str, seed: int) -> None:
        await self.call("POST", "/tenants", {"id": tenant, "seed": seed}, made=True)

    async def ensure(self, tenant: str, seed: int) -> None:
        """Creates it unless it is there."""
        try:
            await self.create(tenant, seed)
        except httpx.HTTPStatusError as error:
            if not is_there(error.response):
                raise

    async def fork(self, tenant: str, target: str) -> None:
        await self.call("POST", f"/tenants/{quote(tenant, safe='')}/fork", {"target": target}, made=True)

    async def memory(self, tenant: str) -> dict[str, Any]:
        """How many tokens of which version each layer holds."""
        return await self.call("GET", f"/tenants/{quote(tenant, safe='')}/memory")

    async def erase(self, tenant: str) -> None:
        """Erases it if it is there."""
        try:
            await self.call("DELETE", f"/tenants/{quote(tenant, safe='')}")
        except httpx.HTTPStatusError as error:
            if error.response.status_code != 404:
                raise
