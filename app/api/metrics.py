"""Prometheus metrics: the API's own, and what the worker's heartbeats bring. No label ever names a tenant."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from app.errors import BY_CODE
from app.messages import Stats

# up to a minute each at most two thirds above the one before, so that a quantile between two of them says something
SECONDS = (
    *(round(step * 10.0**power, 4) for power in range(-3, 2) for step in (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)),
    *(100.0, 300.0, 600.0),
)

# the worker writes "name:value" where a number is kept per value of one label
_LABELS = {
    "memories": "tier",
    "memory_bytes": "tier",
    "memory_evictions_total": "tier",
    "memory_hits_total": "tier",
    "memory_load_seconds": "tier",
    "memory_loads_total": "tier",
    "memory_moved_bytes_total": "direction",
    "request_success_total": "finished_reason",
    "requests_failed_total": "code",
    "store_compactions_failed_total": "code",
}
_MOST_HISTOGRAMS = 64

_WORDS = {
    "fairness_gap_tokens": "how far apart tenants are whose requests wait, in prompt tokens served, by weight",
    "forgotten_tokens_total": "memory tokens that updates have dropped, in each layer",
    "generation_tokens_total": "tokens generated",
    "memories": "memories that are there now, by tier",
    "memory_bytes": "bytes that they take, by tier",
    "memory_evictions_total": "memories that left a tier for another's sake",
    "memory_hits_total": "requests by the tier in which they found their memory",
    "memory_load_seconds": "seconds until a memory was resident, by the tier it came from",
    "memory_loads_total": "memories made resident, by the tier they came from",
    "memory_moved_bytes_total": "bytes into and out of device memory",
    "num_requests_running": "requests that the worker has begun, updates among them",
    "num_requests_waiting": "requests in the worker's queue, updates among them",
    "prompt_tokens_total": "tokens of prompts that were read",
    "request_decode_time_seconds": "seconds from a generation's first token to its end",
    "request_prefill_time_seconds": "seconds from a generation's begin in the worker to its first token",
    "request_queue_time_seconds": "seconds that a request waited in the worker, loading of its memory included",
    "request_success_total": "generations by what ended them",
    "requests_failed_total": "requests that the worker answered with an error, by its code",
    "steps_total": "steps of the worker",
    "store_commits_total": "blocks made durable",
    "store_committed_bytes_total": "bytes of them",
    "store_compactions_failed_total": "snapshots that could not be written, by the error's code",
    "store_compactions_total": "snapshots that took the place of blocks",
    "update_blocks_total": "blocks that updates have published",
    "update_latency_seconds": "seconds from an update's arrival in the worker until all of it was durable",
    "update_tokens_total": "tokens of update contexts that were read",
}


class _WorkerNumbers(Collector):
    """The last heartbeat as metrics. Counters go on where a dead worker's ended."""

    def __init__(self) -> None:
        self.gauges: dict[str, float] = {}
        self.counters: dict[str, float] = {}
        self.before: dict[str, float] = {}

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        totals = dict(self.before)
        for name, value in self.counters.items():
            totals[name] = totals.get(name, 0.0) + value
        families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {}
        for kind, numbers in ((GaugeMetricFamily, self.gauges), (CounterMetricFamily, totals)):
            for key, value in sorted(numbers.items()):
                name, _, label = key.partition(":")
                if name not in families:
                    labels = [_LABELS.get(name, "kind")] if label else []
                    families[name] = kind(f"memoryllm_{name}", _words(name), labels=labels)
                families[name].add_metric([label] if label else [], value)
        yield from families.values()


def _words(name: str) -> str:
    return _WORDS.get(name) or f"{name.replace('_', ' ')} (worker)"


class Metrics:
    """One registry per app, so that several apps can live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._worker = _WorkerNumbers()
        self.registry.register(self._worker)
        self.requests = Counter(
            "memoryllm_http_requests",
            "HTTP requests by route, method and status",
            ["route", "method", "status"],
            registry=self.registry,
        )
        self.errors = Counter(
            "memoryllm_http_errors",
            "requests that were answered with an error, by its code; events of streams included",
            ["code"],
            registry=self.registry,
        )
        for code in BY_CODE:
            # from the start on, or nobody would see the first of them as an increase
            self.errors.labels(code)
        self.request_seconds = Histogram(
            "memoryllm_http_request_duration_seconds",
            "seconds from the first byte of a request to the last of its answer",
            ["route"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.first_token = Histogram(
            "memoryllm_time_to_first_token_seconds",
            "seconds from a generation's arrival to its first token, as the API sees them",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.whole = Histogram(
            "memoryllm_e2e_request_latency_seconds",
            "seconds from a generation's arrival to its end, as the API sees them",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.inter_token = Histogram(
            "memoryllm_inter_token_latency_seconds",
            "seconds between two tokens of a generation, as the API receives them",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.restarts = Counter(
            "memoryllm_worker_restarts",
            "worker processes started again after a death or a hang",
            registry=self.registry,
        )
        self._observed: dict[str, Histogram] = {}

    def worker_stats(self, stats: Stats) -> None:
        self._worker.gauges = stats.gauges
        self._worker.counters = stats.counters
        for key, values in stats.observations.items():
            name, _, label = key.partition(":")
            histogram = self._histogram(name, [_LABELS.get(name, "kind")] if label else [])
            if histogram is not None:
                child = histogram.labels(label) if label else histogram
                for value in values:
                    child.observe(value)

    def _histogram(self, name: str, labels: list[str]) -> Histogram | None:
        if name not in self._observed and len(self._observed) < _MOST_HISTOGRAMS:
            self._observed[name] = Histogram(
                f"memoryllm_{name}", _words(name), labels, buckets=SECONDS, registry=self.registry
            )
        return self._observed.get(name)

    def worker_gone(self) -> None:
        """Keeps what the worker counted; its gauges no longer hold."""
        for name, value in self._worker.counters.items():
            self._worker.before[name] = self._worker.before.get(name, 0.0) + value
        self._worker.counters = {}
        self._worker.gauges = {}

    def render(self) -> bytes:
        """The registry in Prometheus' text format."""
        return generate_latest(self.registry)
