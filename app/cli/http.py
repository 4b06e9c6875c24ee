"""The server as the commands see it: requests, streams of events, and errors with exit codes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from urllib.parse import quote

import httpx

from app.cli.errors import FAILED, UNAVAILABLE, Refusal, exit_code


@dataclass(frozen=True)
class Event:
    """One server-sent event; ``name`` is "message" where the server gave none."""

    name: str
    data: Any


class Api:
    """A client of one server. ``as_json``: errors are to be printed as JSON."""

    def __init__(self, url: str, *, as_json: bool = False, timeout: float = 600.0) -> None:
        self.url, self.as_json = url, as_json
        try:
            self._http = httpx.Client(
                base_url=url, timeout=httpx.Timeout(timeout, connect=5.0), trust_env=False
            )
        except (httpx.InvalidURL, ValueError) as error:
            raise Refusal(f"{url} is no URL of a server: {error}", 2, as_json=as_json) from error

    def __enter__(self) -> Api:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def _refusal(self, message: str, exit_with: int, **rest: Any) -> Refusal:
        return Refusal(message, exit_with, as_json=self.as_json, **rest)

    def _unreachable(self, error: httpx.TransportError) -> Refusal:
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            return self._refusal(
                f"no server answers at {self.url}; start one with: memoryllm serve", UNAVAILABLE
            )
        return self._refusal(f"the connection to {self.url} broke: {error}", UNAVAILABLE)

    def _failed(self, status: int, body: bytes) -> Refusal:
        try:
            answer = json.loads(body)
            error = answer["error"]
            return self._refusal(
                str(error["message"]),
                exit_code(status),
                code=str(error.get("code")),
                request_id=answer.get("request_id"),
            )
        except (ValueError, KeyError, TypeError):
            return self._refusal(f"the server answered {status}, and not in its own form", exit_code(status))

    def call(self, method: str, path: str, body: dict[str, Any] | None = None, **query: Any) -> Any:
        """The answer's JSON. Raises Refusal."""
        try:
            response = self._http.request(
                method, path, json=body, params={k: v for k, v in query.items() if v is not None}
            )
        except httpx.TransportError as error:
            raise self._unreachable(error) from error
        if response.is_error:
            raise self._failed(response.status_code, response.content)
        try:
            return response.json()
        except ValueError as error:
            raise self._refusal(
                "the server's answer is no JSON; is this a memoryllm server?", FAILED
            ) from error

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[Event]:
        """The events of a streamed answer, up to ``[DONE]`` or the end. Raises Refusal, also for error events."""
        try:
            with self._http.stream("POST", path, json=body) as response:
                if response.is_error:
                    raise self._failed(response.status_code, response.read())
                yield from self._events(response.iter_lines())
        except httpx.TransportError as error:
            raise self._unreachable(error) from error

    def _events(self, lines: Iterator[str]) -> Iterator[Event]:
        name = "message"
        for line in lines:
            if line.startswith("event:"):
                name = line.removeprefix("event:").strip()
            elif line.startswith("data:"):
                text = line.removeprefix("data:").strip()
                if text == "[DONE]":
                    return
                try:
                    data = json.loads(text)
                except ValueError as error:
                    raise self._refusal("the server sent an event that is no JSON", FAILED) from error
                if isinstance(data, dict) and "error" in data:
                    raise self._failed(500, text.encode())
                yield Event(name, data)
            elif not line:
                name = "message"


def tenant_path(tenant: str, rest: str = "") -> str:
    """The path of a tenant's resource, its name percent-encoded."""
    return f"/tenants/{quote(tenant, safe='')}{rest}"
