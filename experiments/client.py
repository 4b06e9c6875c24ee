"""The little of the HTTP API that experiments need, asynchronous, with retries where the server asks for them."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any

import httpx

BUSY = {429, 503}


class Client:
    """Talks to a running ``memoryllm serve``."""

    def __init__(self, url: str, connections: int) -> None:
        limits = httpx.Limits(max_connections=connections)
        self._http = httpx.AsyncClient(base_url=url, timeout=600.0, limits=limits, trust_env=False)

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Raises httpx.HTTPStatusError with the server's message for any answer but a success."""
        while True:
            response = await self._http.request(method, path, json=body)
            if response.status_code not in BUSY:
                break
            await asyncio.sleep(float(response.headers.get("retry-after", "1")))
        if response.is_error:
            raise httpx.HTTPStatusError(response.text, request=response.request, response=response)
        answer: dict[str, Any] = response.json()
        return answer

    async def update(self, tenant: str, text: str, short: str = "refuse") -> dict[str, Any]:
        return await self.call("POST", "/update", {"tenant": tenant, "text": text, "short": short})

    async def ask(self, tenant: str, question: str, max_tokens: int = 32) -> str:
        """The answer to a question put as a chat message, greedily, without white space around it."""
        body = {
            "tenant": tenant,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": max_tokens,
            "temperature": 0.0,
        }
        answer = await self.call("POST", "/generate", body)
        return str(answer["text"]).strip()

    async def erase(self, tenant: str) -> None:
        await self.call("DELETE", f"/tenants/{tenant}")
