"""The command line against a small fake server: what it sends, what it prints, how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from app.cli import main
from app.cli.serve import read_settings
from app.settings import Settings


@dataclass
class Fake:
    """Answers as told; remembers what it was sent."""

    url: str = ""
    status: int = 200
    body: bytes = b"{}"
    kind: str = "application/json"
    seen: list[tuple[str, str, Any]] = field(default_factory=list)

    def answer(self, value: Any, status: int = 200) -> None:
        self.body, self.status, self.kind = json.dumps(value).encode(), status, "application/json"

    def events(self, *events: tuple[str | None, Any]) -> None:
        lines = []
        for name, data in events:
            lines += [f"event: {name}"] if name else []
            lines += [f"data: {data if isinstance(data, str) else json.dumps(data)}", ""]
        self.body, self.status, self.kind = "\n".join([*lines, ""]).encode(), 200, "text/event-stream"


@pytest.fixture
def fake() -> Iterator[Fake]:
    state = Fake()

    class Handler(BaseHTTPRequestHandler):
        def _any(self) -> None:
            length = int(self.headers.get("content-length", 0))
            raw = self.rfile.read(length)
            state.seen.append((self.command, self.path, json.loads(raw) if raw else None))
            self.send_response(state.status)
            self.send_header("content-type", state.kind)
            self.send_header("content-length", str(len(state.body)))
            self.end_headers()
            self.wfile.write(state.body)

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


def run(fake: Fake | None, *arguments: str) -> int:
    """The exit code of the command."""
    with pytest.raises(SystemExit) as ended:
        main([*arguments, *(["--url", fake.url] if fake else [])])
    return int(ended.value.code or 0)


UPDATED = {"tenant": "ada", "memory_version": 3, "blocks": 2, "tokens": 40, "surviving_share": 1.0}


def test_update_shows_what_was_remembered(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    fake.events(("progress", {"done": 1, "total": 2, "memory_version": 2}), ("done", UPDATED))
    assert run(fake, "update", "Rex is a dog.", "-t", "ada", "--idempotency-key", "k") == 0
    sent = {
        "tenant": "ada",
        "text": "Rex is a dog.",
        "short": "refuse",
        "idempotency_key": "k",
        "stream": True,
    }
    assert fake.seen == [("POST", "/update", sent)]
    assert "remembered 40 tokens in 2 blocks; 'ada' is at version 3" in capsys.readouterr().out
    assert run(fake, "update", "Rex.", "--json") == 0
    assert json.loads(capsys.readouterr().out) == UPDATED


def test_update_reads_files_and_standard_input(
    fake: Fake, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.events(("done", UPDATED))
    path = tmp_path / "text"
    path.write_text("naïve ☕", "utf-8")
    assert run(fake, "update", "--file", str(path)) == 0
    monkeypatch.setattr("sys.stdin", __import__("io").StringIO("from a pipe"))
    assert run(fake, "update", "-") == 0
    assert [body["text"] for _, _, body in fake.seen] == ["naïve ☕", "from a pipe"]
    path.write_bytes(b"\xff\xfe")
    assert run(fake, "update", "--file", str(path)) == 2
    assert run(fake, "update") == 2
    assert run(fake, "update", "a", "--file", str(path)) == 2


def test_generate_prints_the_text_and_nothing_else(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    fake.answer({"text": "Tarnovik", "finish_reason": "stop"})
    assert run(fake, "generate", "Where?", "--chat", "--temperature", "0", "--stop", "a", "--stop", "b") == 0
    assert fake.seen[0][2] == {
        "tenant": "default",
        "messages": [{"role": "user", "content": "Where?"}],
        "temperature": 0.0,
        "stop": ["a", "b"],
    }
    output = capsys.readouterr()
    assert (output.out, output.err) == ("Tarnovik\n", "")
    fake.events((None, {"text": "Tar"}), (None, {"text": "novik"}), (None, {"text": "", "finish_reason": "stop"}),
                (None, "[DONE]"))  # fmt: skip
    assert run(fake, "generate", "Where?", "--stream") == 0
    assert capsys.readouterr().out == "Tarnovik\n"


def test_score_sums_up(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    fake.answer({"logprobs": [-0.5, -1.0], "greedy": [True, False], "memory_version": 0})
    assert run(fake, "score", "a", "b") == 0
    assert "-1.5000 over 2 tokens, 1 of them" in capsys.readouterr().out


def test_chat_remembers_and_asks(
    fake: Fake, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.events((None, {"text": "Rex"}), ("done", UPDATED))
    monkeypatch.setattr(
        "sys.stdin", __import__("io").StringIO("/remember My dog is Rex.\n\nWho?\n/nonsense\n/quit\nlost\n")
    )
    assert run(fake, "chat") == 0
    assert [(path, body.get("text"), body.get("messages")) for _, path, body in fake.seen] == [
        ("/update", "My dog is Rex.", None),
        ("/generate", None, [{"role": "user", "content": "Who?"}]),
    ]
    assert "unknown command /nonsense" in capsys.readouterr().out


def test_tenant_names_are_encoded_in_paths(fake: Fake) -> None:
    fake.answer({"id": "a/b ü", "memory_version": 0})
    assert run(fake, "tenants", "show", "a/b ü") == 0
    assert run(fake, "tenants", "create", "a/b ü", "--seed", "7") == 0
    assert run(fake, "tenants", "erase", "a/b ü", "--yes") == 0
    assert fake.seen == [
        ("GET", "/tenants/a%2Fb%20%C3%BC", None),
        ("POST", "/tenants", {"id": "a/b ü", "seed": 7}),
        ("DELETE", "/tenants/a%2Fb%20%C3%BC", None),
    ]


def test_erasing_without_a_terminal_needs_yes(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(fake, "tenants", "erase", "ada") == 2
    assert fake.seen == []
    assert "--yes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("status", "code"), [(404, 3), (422, 3), (429, 3), (503, 4), (504, 4), (500, 5), (507, 5)]
)
def test_errors_become_exit_codes(
    fake: Fake, status: int, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.answer({"error": {"message": "it went wrong", "code": "why"}, "request_id": "r1"}, status)
    assert run(fake, "tenants", "show", "ada") == code
    output = capsys.readouterr()
    assert output.out == ""
    assert "it went wrong" in output.err
    assert "r1" in output.err
    assert run(fake, "generate", "x", "--json") == code
    assert json.loads(capsys.readouterr().err)["error"] == {"message": "it went wrong", "code": "why"}
    assert run(fake, "update", "x") == code


def test_an_error_in_the_middle_of_a_stream_is_an_error(fake: Fake) -> None:
    fake.events(
        (None, {"text": "Tar"}), ("error", {"error": {"message": "gone", "code": "worker_unavailable"}})
    )
    assert run(fake, "generate", "x", "--stream") == 5


def test_broken_servers_are_named(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    fake.body = b"<html>"
    assert run(fake, "tenants", "list") == 5
    fake.status = 404
    assert run(fake, "tenants", "list") == 3
    fake.events(("progress", {"done": 1, "total": 2}))
    assert run(fake, "update", "x") == 5
    assert run(None, "tenants", "list", "--url", "http://127.0.0.1:1") == 4
    assert "no server answers" in capsys.readouterr().err


def test_settings_come_from_flags_then_environment_then_defaults(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MEMORYLLM_PORT", "8100")
    monkeypatch.setenv("MEMORYLLM_RESIDENT_BYTES", "2GiB")
    settings = read_settings({"host": "::1", "port": None, "warm_bytes": "3MB"})
    assert (settings.host, settings.port, settings.resident_bytes, settings.warm_bytes) == (
        "::1", 8100, 2 * 2**30, 3 * 2**20,
    )  # fmt: skip
    assert read_settings({"port": "9"}).port == 9
    assert settings.model == Settings.model_fields["model"].default
    for flag, value in [("--port", "abc"), ("--device", "tpu"), ("--resident-bytes", "much")]:
        assert run(None, "serve", flag, value) == 2
    assert capsys.readouterr().err.count("error:") == 3


def test_client_commands_start_without_torch() -> None:
    code = (
        "import sys\nfrom app.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'fastapi'} & set(sys.modules)), file=sys.stderr)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stderr.strip() == "[]"
