"""/metrics of a real server: the names that are promised, numbers that are right, and labels that do not grow."""

from __future__ import annotations

import time
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from tests.server.process import ServerProcess, until

PROMPT = [5, 6, 7, 8, 9]
TEXT = [3 + n % 300 for n in range(24)]

# with the meaning, and so the name, that they have in vLLM
AS_IN_VLLM = {
    "num_requests_running": "gauge",
    "num_requests_waiting": "gauge",
    "time_to_first_token_seconds": "histogram",
    "inter_token_latency_seconds": "histogram",
    "e2e_request_latency_seconds": "histogram",
    "request_queue_time_seconds": "histogram",
    "prompt_tokens": "counter",
    "generation_tokens": "counter",
    "request_success": "counter",
}
OURS = {
    "update_blocks": "counter",
    "update_tokens": "counter",
    "update_latency_seconds": "histogram",
    "forgotten_tokens": "counter",
    "memories": "gauge",
    "memory_bytes": "gauge",
    "memory_moved_bytes": "counter",
    "memory_load_seconds": "histogram",
    "store_commits": "counter",
    "fairness_gap_tokens": "gauge",
}


def series(server: ServerProcess) -> tuple[dict[str, str], dict[str, float]]:
    """Types by name, and numbers by name and labels, without the prefix."""
    types, numbers = {}, {}
    for family in text_string_to_metric_families(server.http.get("/metrics").text):
        types[family.name.removeprefix("memoryllm_")] = family.type
        for sample in family.samples:
            labels = "".join(f" {key}={value}" for key, value in sorted(sample.labels.items()))
            numbers[sample.name.removeprefix("memoryllm_") + labels] = sample.value
    return types, numbers


def test_names_numbers_and_labels(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "store") as server:

        def play(tenants: list[str]) -> None:
            for tenant in tenants:
                server.update(tenant, TEXT)
                server.tokens(tenant, PROMPT, 6)
                server.post("/generate", tenant=tenant, prompt=PROMPT, max_tokens=4, stream=True)
                server.http.get(f"/tenants/{tenant}")
                server.http.get(f"/nothing/{tenant}")
                server.http.request(f"X{tenant}".upper(), "/generate")
                server.post("/generate", tenant=tenant)

        def told(tenants: int) -> dict[str, float]:
            """What is told of a worker that is done: its numbers come all together, and later than its answers."""
            found: dict[str, float] = {}

            def done() -> bool:
                nonlocal found
                found = series(server)[1]
                ended = found.get("request_success_total finished_reason=length")
                return ended == 2 * tenants and found["num_requests_running"] == 0

            until(done, "the worker's numbers")
            return found

        # looking is counted too, from the second time on
        series(server)
        began = time.monotonic()
        play(["ada", "bob", "carol"])
        first = told(3)
        seconds = time.monotonic() - began
        types, _ = series(server)
        for names in (AS_IN_VLLM, OURS):
            assert {name: types.get(name) for name in names} == names
        assert first["prompt_tokens_total"] == 6 * len(PROMPT)
        assert first["generation_tokens_total"] == 3 * 6 + 3 * 4
        assert first["time_to_first_token_seconds_count"] == first["e2e_request_latency_seconds_count"] == 6
        assert first["inter_token_latency_seconds_count"] == 3 * 5 + 3 * 3
        assert first["request_success_total finished_reason=length"] == 6
        assert first["request_queue_time_seconds_count"] == 9
        assert (
            0 < first["time_to_first_token_seconds_sum"] < first["e2e_request_latency_seconds_sum"] < seconds
        )
        assert first["store_commits_total"] == first["update_latency_seconds_count"] == 3
        assert first["update_tokens_total"] == 3 * len(TEXT)
        assert first["forgotten_tokens_total"] > 0
        assert first["memories tier=resident"] == first["memory_load_seconds_count tier=cold"] == 3
        assert first["memory_moved_bytes_total direction=in"] == first["memory_bytes tier=resident"] > 0
        assert (
            first["num_requests_running"]
            == first["num_requests_waiting"]
            == first["fairness_gap_tokens"]
            == 0
        )
        play([f"tenant-{number}" for number in range(9)])
        later = told(12)
        assert later["generation_tokens_total"] == 4 * first["generation_tokens_total"]
        # four times as many tenants, paths and methods are no more series
        assert later.keys() == first.keys()
        assert not any(name in key for key in later for name in ("ada", "tenant-", "XADA"))
