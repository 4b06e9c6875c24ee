"""/health, /ready, /metrics, /docs; request ids; what the log says and what it does not."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys

import pytest
import structlog
from prometheus_client.parser import text_string_to_metric_families

from app import logs
from app.api.middleware import tenant_mark
from app.messages import Stats
from app.settings import Settings
from tests.api.conftest import Service
from tests.api.test_bad_input import SECRET, check_error
from tests.api.test_protocol import serving

pytestmark = pytest.mark.anyio

G = {"tenant": SECRET, "prompt": SECRET, "max_tokens": 2}


async def test_ready(service: Service) -> None:
    response = await service.http.get("/ready")
    assert response.status_code == 200
    body = response.json()
    assert body["ready"] is True
    assert (body["model"], body["device"], body["dtype"]) == ("fake", "cpu", "float32")
    assert body["version"]


async def test_not_ready_says_why(service: Service) -> None:
    service.client.detach("the worker ended with exit code 9")
    response = await service.http.get("/ready")
    assert response.status_code == 503
    assert response.json()["reason"] == "the worker ended with exit code 9"
    assert (await service.http.get("/health")).json() == {"status": "ok"}
    check_error(await service.post("/generate", G), 503, "worker_unavailable")
    check_error(await service.http.get("/tenants"), 503, "worker_unavailable")


async def test_draining(service: Service) -> None:
    service.client.drain(5.0)
    assert (await service.http.get("/ready")).status_code == 503
    assert (await service.http.get("/health")).status_code == 200
    response = await service.post("/generate", G)
    check_error(response, 503, "worker_unavailable")
    assert int(response.headers["retry-after"]) >= 1


async def metrics(service: Service) -> dict[str, float]:
    """Samples by name and labels, as Prometheus reads them."""
    text = (await service.http.get("/metrics")).text
    return {
        f"{sample.name}{sorted(sample.labels.items())}": sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_metrics(service: Service) -> None:
    await service.post("/generate", G)
    await service.http.get(f"/{SECRET}")
    await service.http.request(SECRET.upper(), "/generate")
    gauges = {"num_requests_running": 3.0, "memories:resident": 2.0, "memories:warm": 1.0}
    counters = {"prompt_tokens_total": 7.0, "request_success_total:stop": 4.0}
    observations = {"request_queue_time_seconds": [0.2, 0.3], "memory_load_seconds:warm": [0.1]}
    service.answer(Stats(1.0, gauges, counters, observations))
    found = await metrics(service)
    route = "[('method', 'POST'), ('route', '/generate'), ('status', '200')]"
    assert found[f"memoryllm_http_requests_total{route}"] == 1
    assert found["memoryllm_num_requests_running[]"] == 3
    assert found["memoryllm_memories[('tier', 'warm')]"] == 1
    assert found["memoryllm_prompt_tokens_total[]"] == 7
    assert found["memoryllm_request_success_total[('finished_reason', 'stop')]"] == 4
    assert found["memoryllm_request_queue_time_seconds_count[]"] == 2
    first, whole = (
        found[f"memoryllm_{name}_sum[]"]
        for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds")
    )
    assert 0 < first < whole <= found["memoryllm_http_request_duration_seconds_sum[('route', '/generate')]"]
    assert found["memoryllm_memory_load_seconds_count[('tier', 'warm')]"] == 1
    assert found["memoryllm_inter_token_latency_seconds_count[]"] == 1
    assert SECRET.lower() not in (await service.http.get("/metrics")).text.lower()


async def test_the_early_refused_are_counted_where_they_wanted_to_go(service: Service) -> None:
    service.client.drain(5.0)
    assert (await service.post("/generate", G)).status_code == 503
    assert (await service.http.post(f"/{SECRET}")).status_code == 404
    found = await metrics(service)
    assert (
        found["memoryllm_http_requests_total[('method', 'POST'), ('route', '/generate'), ('status', '503')]"]
        == 1
    )
    assert (
        found["memoryllm_http_requests_total[('method', 'POST'), ('route', 'unmatched'), ('status', '404')]"]
        == 1
    )


async def test_buckets_are_round_numbers(service: Service) -> None:
    text = (await service.http.get("/metrics")).text
    bounds = {float(b): b for b in re.findall(r'inter_token_latency_seconds_bucket{le="([^"+]+)"', text)}
    assert len(bounds) > 20
    assert all(len(shown) <= 6 for shown in bounds.values())


async def test_counters_go_on_after_a_restart(service: Service) -> None:
    service.answer(Stats(1.0, {"num_requests_running": 1.0}, {"steps_total": 10.0}))
    service.answer(Stats(2.0, {"num_requests_running": 1.0}, {"steps_total": 12.0}))
    service.client.detach("the worker ended")
    assert "memoryllm_num_requests_running[]" not in await metrics(service)
    service.answer(Stats(3.0, {}, {"steps_total": 1.0}))
    assert (await metrics(service))["memoryllm_steps_total[]"] == 13


async def test_request_ids(service: Service) -> None:
    kept = await service.http.get("/health", headers={"x-request-id": "abc-1"})
    assert kept.headers["x-request-id"] == "abc-1"
    for odd in ("a b", "<script>", "x" * 200, ""):
        made = await service.http.get("/health", headers={"x-request-id": odd})
        assert len(made.headers["x-request-id"]) == 32


async def test_the_log_has_the_request_and_not_its_text(service: Service) -> None:
    logs.configure(Settings(log_level="info"))
    with structlog.testing.capture_logs() as lines:
        await service.post("/generate", G)
        await service.http.get(f"/tenants/{SECRET}")
        await service.post("/update", {"tenant": SECRET, "text": f"{SECRET} " * 9, "idempotency_key": SECRET})
        await service.http.get(f"/{SECRET}?{SECRET}")
    logs.configure(Settings(log_level="error"))
    assert [(line["route"], line["status"]) for line in lines] == [
        ("/generate", 200),
        ("/tenants/{tenant}", 200),
        ("/update", 200),
        ("unmatched", 404),
    ]
    assert lines[0]["tenant"] == lines[1]["tenant"] == tenant_mark(SECRET)
    assert SECRET not in str(lines)


async def test_head_is_get_without_a_body(service: Service) -> None:
    async with serving(service.app) as (host, port):
        for path in ("/", "/health", "/ready", "/metrics", "/v1/models"):
            got = await service.http.get(path)
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(b"HEAD %b HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n" % path.encode())
            async with asyncio.timeout(20):
                told = await reader.read()
            writer.close()
            assert told.startswith(b"HTTP/1.1 200 "), path
            assert b"content-type: %b\r\n" % got.headers["content-type"].encode() in told
            assert b"content-length: " in told
            assert told.endswith(b"\r\n\r\n")
            assert told.count(b"\r\n\r\n") == 1
    assert (await service.http.head("/tenants")).status_code == 405
    assert (await service.http.post("/health")).headers["allow"] == "GET"
    service.client.drain(5.0)
    assert (await service.http.head("/ready")).status_code == 503


async def test_docs(service: Service) -> None:
    assert (await service.http.get("/docs")).status_code == 200
    assert (await service.http.get("/")).json()["links"]["docs"] == "/docs"


def test_the_api_imports_no_torch() -> None:
    code = (
        "import sys, app.api.server, app.api.web; "
        "sys.exit(bool({'torch', 'transformers', 'app.worker'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
