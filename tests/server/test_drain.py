"""SIGTERM at a real server with a real worker: nobody new, what runs ends by itself or is told why it does not."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from tests.server.process import ServerProcess, until

PROMPT = [5, 6, 7, 8, 9]
TEXT = [3 + n % 300 for n in range(24)]


def told(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    return (json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {"))


def test_what_runs_and_waits_ends_by_itself_and_nobody_new_is_let_in(tmp_path: Path) -> None:
    """The worker stands still meanwhile, so that nothing is over before it has been looked at."""
    body: dict[str, Any] = {"prompt": PROMPT, "ignore_eos": True, "return_token_ids": True}
    options = {"max_running": 2, "queue_requests": 4, "drain_timeout": 90, "heartbeat_timeout": 100}
    with (
        ServerProcess(tmp_path / "store", worker_nice=0, **options) as server,
        ThreadPoolExecutor(3) as threads,
        httpx.Client(base_url=server.url, timeout=100.0, trust_env=False) as http,
        http.stream(
            "POST", "/generate", json={"tenant": "ada", "max_tokens": 600, "stream": True, **body}
        ) as stream,
    ):
        events = stream.iter_lines()
        assert next(events).startswith("data: {")
        os.kill(worker := server.worker_pid, signal.SIGSTOP)
        try:
            # one that begins, and two of whom one waits for a place
            whole = [
                threads.submit(http.post, "/generate", json={"tenant": tenant, "max_tokens": 4, **body})
                for tenant in ("bob", "carol")
            ]
            update = threads.submit(http.post, "/update", json={"tenant": "dora", "text": TEXT})
            # until there is no room for a fifth, anything else is wrong with this one
            until(lambda: server.post("/generate").status_code == 503, "all four requests")
            server.process.send_signal(signal.SIGTERM)
            until(lambda: server.http.get("/ready").status_code == 503, "that the server is not ready")
            assert server.http.get("/ready").json()["reason"] == "the server is shutting down"
            assert server.http.get("/health").status_code == 200
            for path, more in (("/generate", {"prompt": PROMPT}), ("/update", {"text": TEXT})):
                refused = server.post(path, tenant="eve", **more)
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, "worker_unavailable")
                assert 1 <= int(refused.headers["retry-after"]) <= 90
        finally:
            os.kill(worker, signal.SIGCONT)
        *_, last, done = (line for line in events if line)
        assert done == "data: [DONE]"
        ended = json.loads(last.removeprefix("data: "))
        assert (ended["finish_reason"], ended["usage"]["completion_tokens"]) == ("length", 600)
        assert [len(answer.result().json()["token_ids"]) for answer in whole] == [4, 4]
        assert update.result().json()["memory_version"] == 1
        assert server.process.wait(60) == 0
    with ServerProcess(tmp_path / "store") as server:
        assert [server.version(tenant) for tenant in ("dora", "eve")] == [1, 0]


def test_what_does_not_end_by_the_deadline_is_told_and_no_block_is_lost(tmp_path: Path) -> None:
    endless = {"prompt": PROMPT, "max_tokens": 4000, "ignore_eos": True, "return_token_ids": True}
    long = {"text": [3 + n % 317 for n in range(131_072)], "idempotency_key": "long"}
    with (
        ServerProcess(tmp_path / "store", max_running=2, queue_requests=3, drain_timeout=1) as server,
        ThreadPoolExecutor(1) as threads,
        httpx.Client(base_url=server.url, timeout=100.0, trust_env=False) as http,
        http.stream("POST", "/update", json={"tenant": "bob", "stream": True, **long}) as update,
    ):
        blocks = told(update.iter_lines())
        first = next(blocks)
        with http.stream("POST", "/generate", json={"tenant": "ada", "stream": True, **endless}) as stream:
            tokens = told(stream.iter_lines())
            next(tokens)
            waiting = threads.submit(http.post, "/generate", json={"tenant": "carol", **endless})
            until(lambda: server.post("/generate").status_code == 503, "all three requests")
            server.process.send_signal(signal.SIGTERM)
            *_, ended = tokens
            assert ended["error"]["code"] == "worker_unavailable"
        *progress, ended = [first, *blocks]
        assert ended["error"]["code"] == "worker_unavailable"
        refused = waiting.result()
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "worker_unavailable")
        assert server.process.wait(60) == 0
    with ServerProcess(tmp_path / "store") as server:
        assert server.version("bob") >= progress[-1]["memory_version"] > 0
