"""A small fake server on loopback that answers as told and remembers what it was sent."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from app.cli import main, output

UPDATED = {
    "tenant": "ada",
    "memory_version": 3,
    "blocks": 2,
    "tokens": 40,
    "short": "none",
    "replayed": False,
}


@dataclass
class Reply:
    status: int = 200
    kind: str = "application/json"
    body: bytes = b"{}"
    length: int | None = None
    # the connection stays open after the body until the client leaves
    open_end: bool = False
    # sent instead of any HTTP
    raw: bytes | None = None


@dataclass
class Fake:
    """Replies by path without the query; ``seen`` has method, path and JSON body of every request.

    ``bodies`` are those that were files.
    """

    url: str = ""
    replies: dict[str, Reply] = field(default_factory=dict)
    seen: list[tuple[str, str, Any]] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    client_left: threading.Event = field(default_factory=threading.Event)

    def reply(self, path: str, reply: Reply) -> None:
        self.replies[path] = reply

    def answer(self, path: str, value: Any, status: int = 200) -> None:
        self.reply(path, Reply(status, body=json.dumps(value).encode()))

    def events(self, path: str, *events: tuple[str | None, Any], open_end: bool = False) -> None:
        """JSON is sent as the real server does it: with every character as it is."""
        body = "".join(
            (f"event: {name}\n" if name else "")
            + f"data: {data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)}\n\n"
            for name, data in events
        )
        self.reply(path, Reply(kind="text/event-stream", body=body.encode(), open_end=open_end))

    def generated(self, *pieces: str) -> None:
        """A streamed generation."""
        last = {"text": "", "finish_reason": "stop", "memory_version": 3}
        self.events(
            "/generate", *((None, {"text": piece}) for piece in pieces), (None, last), (None, "[DONE]")
        )


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("URL", "TENANT", "PORT", "HOST", "STORE", "MODEL"):
        monkeypatch.delenv(f"MEMORYLLM_{name}", raising=False)
    monkeypatch.setenv("COLUMNS", "120")
    # the console has read COLUMNS when it was imported
    monkeypatch.setattr(output.out, "width", 120)


@pytest.fixture
def fake() -> Iterator[Fake]:
    state = Fake()

    class Handler(BaseHTTPRequestHandler):
        def _any(self) -> None:
            raw = self._body()
            if self.headers.get("content-type") == "application/octet-stream":
                state.bodies.append(raw)
                raw = b""
            state.seen.append((self.command, self.path, json.loads(raw) if raw else None))
            reply = state.replies.get(self.path.partition("?")[0], Reply(404, body=b"no such path"))
            if reply.raw is not None:
                self.wfile.write(reply.raw)
                return
            self.send_response(reply.status)
            self.send_header("content-type", reply.kind)
            if not reply.open_end:
                self.send_header("content-length", str(reply.length or len(reply.body)))
            self.end_headers()
            self.wfile.write(reply.body)
            if reply.open_end:
                self._until_the_client_leaves()
                state.client_left.set()

        def _body(self) -> bytes:
            if self.headers.get("transfer-encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("content-length", 0)))
            pieces = []
            while size := int(self.rfile.readline(), 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)

        def _until_the_client_leaves(self) -> None:
            # the comments wake a client whose signal came just before it waited
            self.connection.settimeout(0.2)
            with suppress(ConnectionError):
                while True:
                    with suppress(TimeoutError):
                        self.connection.recv(1)
                        return
                    self.connection.sendall(b": waiting\n\n")

        do_GET = do_POST = do_DELETE = _any  # noqa: N815

        def log_message(self, *arguments: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


@dataclass
class Ran:
    code: int
    out: str
    err: str


Run = Callable[..., Ran]


@pytest.fixture
def run(fake: Fake, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in this process, against the fake server unless told otherwise."""

    def call(*arguments: str, stdin: str | bytes = "", url: str | None = None) -> Ran:
        raw = stdin.encode() if isinstance(stdin, str) else stdin
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(raw), "utf-8", "surrogateescape"))
        monkeypatch.setenv("MEMORYLLM_URL", url or fake.url)
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        output = capsys.readouterr()
        return Ran(int(ended.value.code or 0), output.out, output.err)

    return call


Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def start(fake: Fake) -> Iterator[Start]:
    """Starts a command as a process of its own, which does not outlive the test."""
    with ExitStack() as stack:

        def started(*arguments: str, **pipes: Any) -> subprocess.Popen[bytes]:
            process = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-m", "app.cli", *arguments, "--url", fake.url],
                    **(
                        {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
                        | pipes
                    ),
                )
            )
            stack.callback(process.kill)
            return process

        yield started
