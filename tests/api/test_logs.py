"""What the HTTP process logs of requests, at the most talkative level, whatever becomes of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

from app import logs
from app.api.middleware import tenant_mark
from app.api.tokens import Tokenizer
from app.messages import Failed, Generate
from app.settings import Settings
from tests.api.conftest import Service
from tests.api.test_bad_input import SECRET, check_error

pytestmark = pytest.mark.anyio

TEXT = f"{SECRET} lives in {SECRET}. " * 6
BODY = {"tenant": SECRET, "prompt": TEXT, "max_tokens": 3}


@pytest.fixture(autouse=True)
def _quiet_again() -> Iterator[None]:
    yield
    logs.configure(Settings(log_level="error"))


def talkative() -> None:
    """To be called in the test itself: before it, standard error is not yet the one that is captured."""
    logs.configure(Settings(log_level="debug", log_json=True))


def read(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    told = capsys.readouterr().err
    assert SECRET not in told
    assert SECRET.lower() not in told.lower()
    return [json.loads(line) for line in told.splitlines()]


async def test_every_request_has_a_line_with_its_ids_and_none_has_text(
    service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    talkative()
    headers = {"x-request-id": "abc-1"}
    await service.post("/generate", BODY, headers=headers)
    await service.post("/generate", {**BODY, "stream": True})
    await service.post("/update", {"tenant": SECRET, "text": TEXT, "idempotency_key": SECRET})
    await service.post("/update", {"tenant": SECRET, "text": TEXT, "messages": TEXT, SECRET: SECRET})
    await service.http.post("/update", content=TEXT, headers={"content-type": SECRET})
    await service.post("/score", {"tenant": SECRET, "prompt": TEXT, "continuation": TEXT})
    await service.post("/generate", {**BODY, "tenant": f"busy{SECRET}"})
    await service.http.get(f"/tenants/{SECRET}/history?before={SECRET}")
    await service.http.get(f"/{SECRET}?{SECRET}", headers={"x-request-id": f"{SECRET}\n", SECRET: SECRET})
    await service.http.get("/health")
    await service.http.request(SECRET, "/generate")
    told = read(capsys)
    assert len(told) == 11
    assert {line["event"] for line in told} == {"request"}
    assert all(line["request_id"] and line["status"] and line["timestamp"] for line in told)
    first, sent = told[0], await service.until_seen(Generate)
    assert isinstance(sent, Generate)
    assert (first["request_id"], first["job"]) == ("abc-1", sent.id)
    # one that never reached the worker has no job, and not that of the one before
    assert ["job" in line for line in told] == [True, True, True, False, False, True, True] + [False] * 4


async def test_what_breaks_is_told_without_what_it_broke_on(
    service: Service,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    talkative()

    def encode(self: Tokenizer, text: str, *_: object, **__: object) -> None:
        raise ValueError(f"cannot encode {text}")

    monkeypatch.setattr(Tokenizer, "ids", encode)
    response = await service.post("/generate", BODY)
    check_error(response, 500, "internal_error")
    broken, line = read(capsys)
    assert broken["event"] == "unhandled error"
    assert "builtins.ValueError" in broken["exception"]
    assert "in encode" in broken["exception"]
    assert broken["request_id"] == line["request_id"] == response.headers["x-request-id"]
    assert response.json()["request_id"] == broken["request_id"]


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "serious"),
    [
        ("/update", {"tenant": "full", "text": TEXT}, 507, "store_full", True),
        ("/update", {"tenant": "full-later", "text": TEXT * 2, "stream": True}, 200, "store_full", True),
        ("/generate", {**BODY, "tenant": "overloaded"}, 503, "server_overloaded", False),
        ("/generate", {**BODY, "tenant": "busy"}, 429, "tenant_queue_full", False),
        ("/generate", {**BODY, "max_tokens": SECRET}, 422, "invalid_request", False),
        (f"/{SECRET}", {}, 404, "not_found", False),
        ("/ready", {}, 405, "method_not_allowed", False),
    ],
)
async def test_what_ends_in_an_error_is_told_and_counted_by_its_code(
    service: Service,
    capsys: pytest.CaptureFixture[str],
    path: str,
    body: dict[str, Any],
    status: int,
    code: str,
    serious: bool,
) -> None:
    talkative()
    before = service.client.metrics.render().decode()
    response = await service.post(path, body)
    assert response.status_code == status
    *_, line = read(capsys)
    assert (line["event"], line["status"], line["code"]) == ("request", status, code)
    assert (line["level"] == "warning") is serious
    # what the client is to mend is told to the client alone
    assert ("reason" in line) is (serious or status == 503)
    if path == "/update":
        assert line["tenant"] == tenant_mark(body["tenant"])
        assert line["reason"] == "the disk is full"
    for count, metrics in ((0, before), (1, service.client.metrics.render().decode())):
        assert f'memoryllm_http_errors_total{{code="{code}"}} {count}.0' in metrics
        assert 'memoryllm_http_errors_total{code="internal_error"} 0.0' in metrics


async def test_a_quarantine_is_told_though_it_is_no_server_error(
    service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    talkative()
    asked = asyncio.create_task(service.post("/generate", {**BODY, "tenant": "hold"}))
    sent = await service.until_seen(Generate)
    assert isinstance(sent, Generate)
    service.answer(Failed(sent.id, "tenant_quarantined", "this tenant is in quarantine: a blob is damaged"))
    check_error(await asked, 409, "tenant_quarantined")
    (line,) = read(capsys)
    assert (line["level"], line["job"], line["code"]) == ("warning", sent.id, "tenant_quarantined")
    assert line["reason"] == "this tenant is in quarantine: a blob is damaged"


async def test_what_was_in_a_worker_that_ended_is_named_by_its_ids(
    service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    talkative()
    calls = [
        asyncio.create_task(service.post("/generate", {**BODY, "tenant": f"hold{SECRET}{n}"}))
        for n in range(20)
    ]
    await service.until_seen(Generate, 20)
    await asyncio.sleep(0)
    service.client.detach("the worker ended with exit code 9")
    await asyncio.gather(*calls)
    ended, *told = read(capsys)
    assert (ended["event"], ended["requests"], len(ended["jobs"])) == ("requests were in the worker", 20, 16)
    assert set(ended["jobs"]) <= {line["job"] for line in told}
    assert {line["status"] for line in told} == {503}


async def test_the_event_loops_own_errors(capsys: pytest.CaptureFixture[str]) -> None:
    talkative()
    context = {
        "message": "Task exception was never retrieved",
        "exception": KeyError(SECRET),
        "future": SECRET,
    }
    logs.loop_error(asyncio.get_running_loop(), context)
    (line,) = read(capsys)
    assert line["what"] == "Task exception was never retrieved"
    assert "KeyError" in line["exception"]
