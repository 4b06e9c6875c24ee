"""The server as the commands see it: requests, streams of events, and errors with exit codes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from urllib.parse import quote, urlsplit

import httpx

from app.cli.errors import FAILED, UNAVAILABLE, USAGE, Refusal, from_answer

KEY_VARIABLE = "MEMORYLLM_API_KEY"
"""Where the API key is taken from: the command line can be read by everyone on the machine."""
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}


class Answer(dict[str, Any]):
    """A JSON object from the server. A field that it should have and has not is the server's failure."""

    def __missing__(self, name: str) -> Any:
        raise Refusal(f"the server's answer has no {name!r}; is this a memoryllm server?", FAILED)


@dataclass(frozen=True)
class Event:
    """One server-sent event; ``name`` is "message" where the server gave none."""

    name: str
    data: Answer


class Api:
    """A client of one server. Every failure is a Refusal; with ``as_json`` it will be printed as JSON."""

    def __init__(self, url: str, *, as_json: bool = False, timeout: float = 600.0) -> None:
        self.url, self.as_json = url, as_json
        key = os.environ.get(KEY_VARIABLE, "").strip()
        if key and not (key.isascii() and key.isprintable()):
            raise Refusal(f"{KEY_VARIABLE} holds no API key", USAGE, as_json=as_json)
        try:
            urlsplit(url)
            parsed = httpx.URL(url)
        except (ValueError, httpx.InvalidURL):
            parsed = httpx.URL("")
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise Refusal(f"{url} is no address of a server (http://host:port)", USAGE, as_json=as_json)
        self._http = httpx.Client(
            base_url=parsed,
            # reading the certificates takes longer than most requests
            verify=parsed.scheme == "https",
            timeout=httpx.Timeout(timeout, connect=5.0),
            headers={"authorization": f"Bearer {key}"} if key else {},
            # a proxy would look for the loopback server on its own machine
            trust_env=parsed.host not in _LOOPBACK,
        )

    def __enter__(self) -> Api:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()
        if isinstance(value, Refusal):
            value.as_json = self.as_json

    def call(self, method: str, path: str, body: dict[str, Any] | None = None, **query: Any) -> Answer:
        """The answer's JSON object. Raises Refusal."""
        params = {name: value for name, value in query.items() if value is not None}
        with self._reaching(), self._http.stream(method, path, params=params, **_content(body)) as response:
            raw = response.read()
        return _answer(response, raw)

    @contextmanager
    def download(self, path: str, **query: Any) -> Iterator[tuple[Mapping[str, str], Iterator[bytes]]]:
        """The headers and the pieces of a file. Raises Refusal, also where the file breaks off."""
        with self._reaching(), self._http.stream("GET", path, params=query) as response:
            if not response.is_success:
                _answer(response, response.read())
            yield response.headers, response.iter_bytes(1 << 20)

    def upload(self, path: str, pieces: Iterator[bytes], size: int | None) -> Answer:
        """Sends a file of ``size`` bytes, if that is known, piece by piece; the answer. Raises Refusal."""
        headers = {"content-type": "application/octet-stream"}
        if size is not None:
            headers["content-length"] = str(size)
        with self._reaching(), self._http.stream("POST", path, content=pieces, headers=headers) as response:
            raw = response.read()
        return _answer(response, raw)

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[Event]:
        """The events of a streamed answer, to its ``[DONE]`` or ``done``. Raises Refusal, also for error events.

        Stopping early closes the connection, which ends a generation.
        """
        body = body | {"stream": True}
        with self._reaching(), self._http.stream("POST", path, **_content(body)) as response:
            if response.is_error:
                raise from_answer(response.status_code, _parse(response.read()))
            for name, text in _events(response.iter_bytes()):
                if text == "[DONE]":
                    return
                data = _parse(text)
                if name == "error" or (isinstance(data, Answer) and "error" in data):
                    raise from_answer(None, data)
                if not isinstance(data, Answer):
                    raise Refusal("the server sent an event that is no JSON object", FAILED)
                yield Event(name, data)
                if name == "done":
                    return
        raise Refusal("the server broke off its answer", FAILED)

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise Refusal(
                f"no server answers at {self.url}; memoryllm serve starts one", UNAVAILABLE
            ) from error
        except httpx.TransportError as error:
            raise Refusal(f"the connection to {self.url} broke: {error}", UNAVAILABLE) from error
        except httpx.DecodingError as error:
            raise Refusal("the server's answer cannot be decoded", FAILED) from error


def tenant_path(tenant: str, rest: str = "") -> str:
    """The path of a tenant's resource, its name percent-encoded."""
    return f"/tenants/{quote(_utf8(tenant), safe='')}{rest}"


def _content(body: dict[str, Any] | None) -> dict[str, Any]:
    if body is None:
        return {}
    content = _utf8(json.dumps(body, ensure_ascii=False))
    return {"content": content, "headers": {"content-type": "application/json"}}


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        # arguments that were no UTF-8 arrive as surrogates
        raise Refusal("the text is not valid UTF-8", USAGE) from error


def _answer(response: httpx.Response, raw: bytes) -> Answer:
    """The JSON object in ``raw``. Raises Refusal."""
    answer = _parse(raw)
    if response.is_error:
        raise from_answer(response.status_code, answer)
    if not response.is_success or not isinstance(answer, Answer):
        raise Refusal("the server's answer is no JSON; is this a memoryllm server?", FAILED)
    return answer


def _parse(text: str | bytes) -> Any:
    """JSON with Answers for its objects; None for anything else."""
    try:
        return json.loads(text, object_hook=Answer)
    except (ValueError, RecursionError):
        return None


def _events(chunks: Iterator[bytes]) -> Iterator[tuple[str, str]]:
    """Names and data of server-sent events. Only line feeds end lines here: JSON may hold U+2028 and U+0085."""
    name, data, rest = "message", list[str](), b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for raw in lines:
            field, _, value = raw.removesuffix(b"\r").decode("utf-8", "replace").partition(":")
            value = value.removeprefix(" ")
            if field == "event":
                name = value
            elif field == "data":
                data.append(value)
            elif not field and not value and not raw.startswith(b":"):
                if data:
                    yield name, "\n".join(data)
                name, data = "message", []
