"""The server's numbers as they stand in /metrics, and what of them has to agree with the client's."""

from __future__ import annotations

import dataclasses
import math

import pytest

from loadtest.client import Answer
from loadtest.scrape import agreement, by_label, mean_of, parse, since, total

TEXT = b"""# HELP memoryllm_http_requests_total HTTP requests
# TYPE memoryllm_http_requests_total counter
memoryllm_http_requests_total{method="POST",route="/generate",status="200"} 3.0
memoryllm_http_requests_total{method="POST",route="/generate",status="429"} 1.0
memoryllm_http_requests_total{method="POST",route="/generate/x",status="200"} 7.0
memoryllm_generation_tokens_total 30.0
memoryllm_memories{tier="resident"} 16.0
memoryllm_memories{tier="warm"} 2.0
memoryllm_memory_bytes{tier="warm"} 9e+06
memoryllm_time_to_first_token_seconds_count 3.0
memoryllm_time_to_first_token_seconds_sum 0.6
memoryllm_inter_token_latency_seconds_count 27.0
memoryllm_inter_token_latency_seconds_sum 0.27
memoryllm_e2e_request_latency_seconds_count 2.0
memoryllm_e2e_request_latency_seconds_sum 0.64
"""

READ = Answer(
    "generate", "t", "", due=9.0, sent=10.0, first=10.2, last=10.29, end=10.32, status=200, streamed=True
)


def answers() -> list[Answer]:
    """One to the end, one in one piece, one who hung up, one refused."""
    read = dataclasses.replace(READ, tokens=10, events=11)
    whole = dataclasses.replace(read, streamed=False, first=10.32, last=10.32, first_token=0.2)
    left = dataclasses.replace(read, hung_up=True, end=10.2)
    refused = dataclasses.replace(READ, status=429, code="tenant_queue_full", streamed=False, tokens=0)
    return [read, whole, left, refused]


def test_reading() -> None:
    metrics = parse(TEXT)
    assert total(metrics, "http_requests_total") == 11
    assert total(metrics, "http_requests_total", route="/generate") == 4
    assert total(metrics, "http_requests_total", route="/generate", status="200") == 3
    assert total(metrics, "http_requests") == 0
    assert by_label(metrics, "memories") == {"resident": 16, "warm": 2}
    assert mean_of(metrics, "time_to_first_token_seconds") == pytest.approx(0.2)
    assert math.isnan(mean_of(metrics, "nothing"))
    before = {"generation_tokens_total": 10.0}
    assert since(before, metrics)["generation_tokens_total"] == 20


def test_two_who_count_alike() -> None:
    compared = {a.what: a for a in agreement(parse(TEXT), answers())}
    assert [a.what for a in compared.values() if not a.good] == []
    assert (compared["generated tokens"].client, compared["generated tokens"].server) == (30, 30)
    assert {what for what in compared if what.startswith("mean")} == {
        "mean time to first token, s",
        "mean time per token, s",
        "mean of a whole generation, s",
    }


@pytest.mark.parametrize(
    ("was", "now", "what"),
    [
        (b'status="200"} 3.0', b'status="200"} 4.0', "/generate answered with 200"),
        (b'status="429"} 1.0', b'status="429"} 0.0', "/generate refused or failed"),
        (b"generation_tokens_total 30.0", b"generation_tokens_total 32.0", "generated tokens"),
        (b"first_token_seconds_sum 0.6", b"first_token_seconds_sum 0.5", "mean time to first token, s"),
        (b"latency_seconds_sum 0.27", b"latency_seconds_sum 0.3", "mean time per token, s"),
        (b"latency_seconds_sum 0.64", b"latency_seconds_sum 0.7", "mean of a whole generation, s"),
    ],
)
def test_two_who_do_not(was: bytes, now: bytes, what: str) -> None:
    assert was in TEXT
    bad = [a.what for a in agreement(parse(TEXT.replace(was, now)), answers()) if not a.good]
    assert bad == [what]


def test_more_prompts_than_were_sent() -> None:
    read = dataclasses.replace(READ, tokens=10, prompt_tokens=5)
    metrics = parse(TEXT) | {"prompt_tokens_total": 6.0}
    assert "prompt tokens" in {a.what for a in agreement(metrics, [read]) if not a.good}


def test_blocks() -> None:
    update = Answer("update", "t", "", due=0.0, sent=1.0, end=2.0, status=200, blocks=3)
    key = 'http_requests_total{route="/update",status="200"}'
    for published, good in ((3.0, True), (2.0, False)):
        compared = agreement({"update_blocks_total": published, key: 1.0}, [update])
        assert all(a.good for a in compared) is good
