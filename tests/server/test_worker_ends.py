"""A real worker that hangs, that is killed, and requests that run out of time: each is told, and nobody else harmed."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.server.process import ServerProcess, until

PROMPT = [5, 6, 7, 8, 9]
LONG = {"prompt": PROMPT, "max_tokens": 4000, "ignore_eos": True, "return_token_ids": True}
TEXT = [3 + n % 300 for n in range(24)]


@contextmanager
def streaming(server: ServerProcess, path: str, **body: Any) -> Iterator[Iterator[dict[str, Any]]]:
    """The events of a stream, once the first of them is there."""

    def told(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
        for line in lines:
            if line.startswith("data: {"):
                yield json.loads(line.removeprefix("data: "))

    with (
        httpx.Client(base_url=server.url, timeout=60.0, trust_env=False) as http,
        http.stream("POST", path, json={**body, "stream": True}) as answer,
    ):
        assert answer.status_code == 200
        events = told(answer.iter_lines())
        first = next(events)
        yield (event for part in ([first], events) for event in part)


def last(events: Iterator[dict[str, Any]]) -> dict[str, Any]:
    *_, event = events
    return event


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_deadlines_pass_and_a_worker_that_hangs_is_replaced(tmp_path: Path) -> None:
    options = {"heartbeat_timeout": 4, "max_running": 1}
    with ServerProcess(tmp_path / "store", **options) as server, ThreadPoolExecutor(1) as thread:
        server.update("ada", TEXT)
        expected = server.tokens("ada", PROMPT)
        with streaming(server, "/generate", tenant="ada", timeout=1.0, **LONG) as events:
            assert last(events)["error"]["code"] == "deadline_exceeded"
        with streaming(server, "/generate", tenant="ada", **LONG) as events:
            waited = server.post("/generate", tenant="bob", timeout=0.2, **LONG)
            assert (waited.status_code, waited.json()["error"]["code"]) == (504, "deadline_exceeded")
            worker = server.worker_pid
            os.kill(worker, signal.SIGSTOP)
            # of this one nobody has seen anything: the next worker answers it
            asked = thread.submit(server.tokens, "ada", PROMPT)
            error = last(events)["error"]
        assert error["code"] == "worker_unavailable"
        assert "was silent for 4 s" in error["message"]
        assert asked.result(60) == expected
        assert gone(worker)
        assert server.worker_pid != worker
        assert server.version("ada") == 1
        assert "memoryllm_worker_restarts_total 1.0" in server.http.get("/metrics").text


def test_what_was_in_the_worker_at_two_crashes_is_not_tried_a_third_time(tmp_path: Path) -> None:
    """A generation that its client sends again, and an update that the server itself sends again."""
    generation = {"tenant": "eve", **LONG}
    update = {"tenant": "ada", "text": [3 + n % 317 for n in range(131_072)], "idempotency_key": "long"}
    with ServerProcess(tmp_path / "store") as server:
        server.update("bob", TEXT)
        expected = server.tokens("bob", PROMPT)
        with streaming(server, "/update", **update) as updating:
            with streaming(server, "/generate", **generation) as generating:
                os.kill(first := server.worker_pid, signal.SIGKILL)
                assert last(generating)["error"]["code"] == "worker_unavailable"
            until(lambda: gone(first), "the end of the first worker")
            server.wait_ready()
            durable = server.version("ada")
            assert durable >= next(updating)["memory_version"]
            until(lambda: server.version("ada") > durable, "the update going on by itself")
            with streaming(server, "/generate", **generation) as generating:
                os.kill(second := server.worker_pid, signal.SIGKILL)
                assert last(generating)["error"]["code"] == "request_crashed"
            *progress, ended = updating
        assert ended["error"]["code"] == "request_crashed"
        until(lambda: gone(second), "the end of the second worker")
        server.wait_ready()
        third = server.worker_pid
        assert third not in {first, second}
        for path, body in (("/generate", generation), ("/update", update)):
            refused = server.post(path, **body)
            assert (refused.status_code, refused.json()["error"]["code"]) == (500, "request_crashed")
        # it never reached the worker; what was told of is there, and others are served
        assert server.worker_pid == third
        assert server.version("ada") >= max(event["memory_version"] for event in progress)
        assert server.tokens("bob", PROMPT) == expected
        assert server.tokens("eve", PROMPT)
