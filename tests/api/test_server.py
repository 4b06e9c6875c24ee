"""The server as a process, over real HTTP, with a fake worker that can be made to crash, hang, or never start."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from app.keys.file import write
from app.keys.ring import make
from tests.api.test_bad_input import check_error
from tests.api.test_update import events

SERVE = (
    "import sys; from app.api import server; from app.settings import Settings; server.WORKER_LAST_SECONDS = 0.2;"
    "sys.exit(server.run_server(Settings(), command=(sys.executable, '-m', 'tests.api.fake_worker')))"
)
FAST = {
    "MEMORYLLM_HEARTBEAT_TIMEOUT": "1.5",
    "MEMORYLLM_START_TIMEOUT": "20",
    "MEMORYLLM_DRAIN_TIMEOUT": "10",
}


def until(condition: Callable[[], bool], what: str, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"in vain: {what}"
        time.sleep(0.02)


@dataclass
class Server:
    process: subprocess.Popen[str]
    url: str
    http: httpx.Client
    log: Path

    def ready(self) -> bool:
        return self.http.get("/ready").status_code == 200

    def noted(self, word: str) -> list[str]:
        """What followed ``word`` in the lines the fake workers have written."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line.removeprefix(word).strip() for line in lines if line.startswith(word)]

    def worker(self) -> int:
        return int(self.noted("start")[-1])


@contextmanager
def serving(tmp_path: Path, model_dir: Path, **environment: str) -> Iterator[Server]:
    log = tmp_path / "log"
    env = {
        **os.environ,
        **FAST,
        "MEMORYLLM_PORT": "0",
        "FAKE_WORKER_MODEL": str(model_dir),
        "FAKE_WORKER_LOG": str(log),
        "TMPDIR": str(tmp_path),
        **environment,
    }
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        url = process.stdout.readline().strip().removeprefix("listening on ")
        with httpx.Client(base_url=url.replace("0.0.0.0", "127.0.0.1"), timeout=20) as http:
            yield Server(process, url, http, log)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


@pytest.fixture
def server(tmp_path: Path, model_dir: Path) -> Iterator[Server]:
    with serving(tmp_path, model_dir) as server:
        until(server.ready, "readiness")
        yield server


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


GENERATE = {"tenant": "alice", "prompt": "Lisbon", "max_tokens": 3}


def test_one_life_of_a_server(server: Server, tmp_path: Path) -> None:
    # it answers
    whole = server.http.post("/generate", json=GENERATE).json()
    streamed = server.http.post("/generate", json={**GENERATE, "stream": True})
    told = [data for _, data in events(streamed.text)]
    assert "".join(chunk["text"] for chunk in told[:-1]) == whole["text"]

    # a worker that crashes is replaced; the request that makes it crash is tried twice, by whoever sends it
    first = server.worker()
    crashed = server.http.post("/generate", json={**GENERATE, "tenant": "crash"})
    check_error(crashed, 500, "request_crashed")
    assert len(server.noted("start")) >= 2
    until(server.ready, "a new worker after two crashes")
    assert server.worker() != first
    second = server.worker()
    check_error(server.http.post("/generate", json={**GENERATE, "tenant": "crash"}), 500, "request_crashed")
    assert server.worker() == second
    assert server.http.post("/generate", json=GENERATE).json()["text"] == whole["text"]

    # and so does one that is killed while it streams
    with server.http.stream(
        "POST", "/generate", json={**GENERATE, "tenant": "hold", "stream": True}
    ) as stream:
        lines = stream.iter_lines()
        assert next(lines).startswith("data: ")
        os.kill(server.worker(), signal.SIGKILL)
        rest = "\n".join(lines)
    assert '"worker_unavailable"' in rest
    until(server.ready, "a new worker after a kill")

    # one that hangs is killed and replaced; what it had not answered is asked again, what had begun is told
    hung = server.worker()
    with streaming(server, "hold-another") as lines:
        with httpx.Client(base_url=server.url, timeout=20) as other:
            answer = other.post("/generate", json={**GENERATE, "tenant": "hang-once"})
        rest = "\n".join(lines)
    assert answer.status_code == 200
    assert '"worker_unavailable"' in rest
    assert "was silent for" in rest
    assert not alive(hung)
    assert server.http.get("/health").status_code == 200
    assert "memoryllm_worker_restarts_total 4.0" in server.http.get("/metrics").text

    # a client that goes away ends its generation
    port = int(server.url.rpartition(":")[2])
    body = json.dumps({**GENERATE, "tenant": "hold"}).encode()
    lines_sent = ["POST /generate HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    head = "\r\n".join([*lines_sent, f"Content-Length: {len(body)}", "", ""])
    running = "memoryllm_num_requests_running 1.0"
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(head.encode() + body)
        until(lambda: running in server.http.get("/metrics").text, "a running generation")
    until(lambda: running not in server.http.get("/metrics").text, "its end")

    # asked to end, it lets what runs finish, takes nothing new, and leaves nothing behind
    worker = server.worker()
    answers: list[httpx.Response] = []
    held = {**GENERATE, "tenant": "hold"}
    call = threading.Thread(
        target=lambda: answers.append(httpx.post(f"{server.url}/generate", json=held, timeout=20))
    )
    call.start()
    until(lambda: running in server.http.get("/metrics").text, "a running generation")
    server.process.send_signal(signal.SIGTERM)
    call.join()
    assert answers[0].status_code == 200
    assert server.process.wait(20) == 0
    assert server.noted("drain") == [""]
    assert not alive(worker)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("memoryllm-")] == []


def test_a_killed_server_takes_its_worker_along(server: Server) -> None:
    worker = server.worker()
    server.process.kill()
    server.process.wait()
    until(lambda: not alive(worker), "the worker's end")


@pytest.mark.parametrize(("fault", "message"), [("fatal", "there is no such model"), ("exit", "exit code 3")])
def test_a_worker_that_cannot_start_ends_the_server(
    tmp_path: Path, model_dir: Path, fault: str, message: str
) -> None:
    with serving(tmp_path, model_dir, FAKE_WORKER=fault) as server:
        assert server.process.wait(20) == 1
        assert server.process.stderr is not None
        assert message in server.process.stderr.read()
        assert len(server.noted("start")) == 1


def test_a_tokenizer_that_cannot_be_read_ends_the_server(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "tokenizer.json").write_text("{}")
    with serving(tmp_path, broken) as server:
        assert server.process.wait(20) == 1
        assert server.process.stderr is not None
        assert "tokenizer.json cannot be read" in server.process.stderr.read()


def test_an_address_in_use(tmp_path: Path, model_dir: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with serving(tmp_path, model_dir, MEMORYLLM_PORT=port) as server:
            assert server.process.wait(20) == 1
            assert server.process.stderr is not None
            assert f"cannot listen on 127.0.0.1 port {port}" in server.process.stderr.read()
            assert server.noted("start") == []


def test_a_network_address_without_keys_is_refused(tmp_path: Path, model_dir: Path) -> None:
    with serving(tmp_path, model_dir, MEMORYLLM_HOST="0.0.0.0") as server:
        assert server.process.wait(20) == 1
        assert server.process.stderr is not None
        assert "there are no API keys" in server.process.stderr.read()
        assert server.noted("start") == []


def test_a_network_address_that_is_wanted_without_keys_gets_a_warning(
    tmp_path: Path, model_dir: Path
) -> None:
    with serving(tmp_path, model_dir, MEMORYLLM_HOST="0.0.0.0", MEMORYLLM_INSECURE="1") as server:
        assert server.url.startswith("http://0.0.0.0:")
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0
        assert server.process.stderr is not None
        assert server.process.stderr.read().count("warning: 0.0.0.0 can be reached from the network") == 1


def test_keys_guard_a_real_server_and_a_revoked_one_is_refused_while_it_runs(
    tmp_path: Path, model_dir: Path
) -> None:
    path = tmp_path / "keys.json"
    (kept, kept_entry), (revoked, revoked_entry) = make(admin=True), make(tenants=["alice"])
    write(path, [kept_entry, revoked_entry])
    # a line a request would fill the pipe that nobody reads meanwhile
    options = {"HOST": "0.0.0.0", "KEYS_FILE": str(path), "LOG_LEVEL": "error"}
    environment = {f"MEMORYLLM_{name}": value for name, value in options.items()}
    with serving(tmp_path, model_dir, **environment) as server:
        assert server.url.startswith("http://0.0.0.0:")
        until(server.ready, "readiness")

        def generate(key: str | None = None) -> httpx.Response:
            headers = {} if key is None else {"authorization": f"Bearer {key}"}
            return server.http.post("/generate", json=GENERATE, headers=headers)

        check_error(generate(), 401, "invalid_api_key")
        check_error(generate(make(admin=True)[0]), 401, "invalid_api_key")
        assert [generate(key).status_code for key in (kept, revoked)] == [200, 200]
        write(path, [kept_entry])
        until(lambda: generate(revoked).status_code == 401, "the refusal of a revoked key")
        assert generate(kept).status_code == 200


@contextmanager
def streaming(server: Server, tenant: str) -> Iterator[Iterator[str]]:
    """The lines of a generation that has begun."""
    body = {**GENERATE, "tenant": tenant, "stream": True}
    with server.http.stream("POST", "/generate", json=body) as stream:
        lines = stream.iter_lines()
        assert next(lines).startswith("data: ")
        yield lines


def test_ended_while_the_worker_loads(tmp_path: Path, model_dir: Path) -> None:
    with serving(tmp_path, model_dir, FAKE_WORKER="loading") as server:
        until(lambda: bool(server.noted("start")), "a worker")
        assert not server.ready()
        server.process.terminate()
        assert server.process.wait(20) == 0
        until(lambda: not alive(server.worker()), "the worker's end")


def test_asked_to_end_twice_it_ends_at_once_and_says_so(server: Server) -> None:
    """The worker would go on for ever; the stream gets a last event all the same."""
    with streaming(server, "hold-on") as lines:
        server.process.terminate()
        until(lambda: not server.ready(), "the drain")
        refused = server.http.post("/generate", json=GENERATE)
        check_error(refused, 503, "worker_unavailable")
        assert int(refused.headers["retry-after"]) >= 1
        assert server.process.poll() is None
        server.process.terminate()
        rest = "\n".join(lines)
    assert "event: error" in rest
    assert '"worker_unavailable"' in rest
    assert server.process.wait(20) == 0
    assert not alive(server.worker())


def test_a_worker_that_does_not_end_is_ended(tmp_path: Path, model_dir: Path) -> None:
    with serving(tmp_path, model_dir, MEMORYLLM_DRAIN_TIMEOUT="0.1") as server:
        until(server.ready, "readiness")
        with streaming(server, "hold-on") as lines:
            server.process.terminate()
            rest = "\n".join(lines)
        assert '"worker_unavailable"' in rest
        assert server.process.wait(20) == 0
        assert not alive(server.worker())
