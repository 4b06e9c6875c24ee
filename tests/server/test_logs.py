"""The log of a real server at its most talkative level: JSON to the last line, ids of requests, no word of a user's."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import httpx

from tests.server.process import ServerProcess, until

SECRET = "Swordfish"
TEXT = f"{SECRET} lives in {SECRET}ville and keeps the password Xylophonist in a drawer. " * 3


def test_neither_requests_nor_errors_nor_crashes_put_text_into_the_log(tmp_path: Path) -> None:
    body = {"tenant": SECRET, "prompt": TEXT, "max_tokens": 4}
    options = {"log_level": "debug", "log_json": True, "max_running": 1}
    with ServerProcess(tmp_path / "store", model="pocket", **options) as server:
        server.update(SECRET, TEXT, idempotency_key=SECRET)
        assert (
            server.post("/update", tenant=SECRET, text=f"{TEXT}!", idempotency_key=SECRET).status_code == 409
        )
        assert server.post("/generate", **body, stop=SECRET, logprobs=2).status_code == 200
        assert server.post("/generate", **body, stream=True).status_code == 200
        assert (
            server.post("/generate", tenant=SECRET, messages=[{"role": SECRET, "content": TEXT}]).status_code
            >= 400
        )
        assert server.post("/generate", **body, **{SECRET: SECRET}).status_code == 422
        assert server.post("/score", tenant=SECRET, prompt=TEXT, continuation=SECRET).status_code == 200
        assert server.http.get(f"/{SECRET}?{SECRET}").status_code == 404
        assert server.http.get(f"/tenants/{SECRET}/history").status_code == 200
        assert server.http.get(f"/tenants/{SECRET}/export?texts=true").status_code == 200
        imported = server.http.post(
            f"/tenants/{SECRET}2/import", content=TEXT, headers={"content-type": "application/octet-stream"}
        )
        assert imported.status_code == 422
        assert server.post(f"/tenants/{SECRET}/rebuild", force=True).status_code == 200
        assert server.post(f"/tenants/{SECRET}/rollback", version=99).status_code == 404
        # and one that runs when its worker is killed
        long = {
            **body,
            "max_tokens": 3600,
            "ignore_eos": True,
            "return_token_ids": True,
            "stream": True,
        }
        worker = server.worker_pid
        with (
            httpx.Client(base_url=server.url, timeout=60.0, trust_env=False) as http,
            http.stream("POST", "/generate", json=long, headers={"x-request-id": "long-1"}) as stream,
        ):
            assert stream.status_code == 200
            next(lines := stream.iter_lines())
            os.kill(worker, signal.SIGKILL)
            assert "worker_unavailable" in "".join(lines)
        server.wait_ready()
        assert server.http.delete(f"/tenants/{SECRET}").status_code == 200
        assert server.stop() == 0
        until(lambda: any('"draining"' in line for line in server.lines), "the last lines")
    told = "".join(server.lines)
    assert SECRET.lower() not in told.lower()
    assert "xylophonist" not in told.lower()
    events = [json.loads(line) for line in server.lines if not line.startswith("listening on ")]
    assert {"request", "worker ready", "worker ended", "requests were in the worker", "draining"} <= {
        event["event"] for event in events
    }
    assert all(event["request_id"] for event in events if event["event"] == "request")
    (long_line,) = [event for event in events if event.get("request_id") == "long-1"]
    (inside,) = [event for event in events if event["event"] == "requests were in the worker"]
    assert inside["jobs"] == [long_line["job"]]
