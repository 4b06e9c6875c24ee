"""The server's own numbers: /metrics once a second beside memory and processor time, and how they agree with ours."""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from loadtest.client import Answer, Client
from loadtest.figures import mean
from loadtest.server import Server

Metrics = dict[str, float]

SECOND = 1.0
# the worker's numbers come with its heartbeat, once a second
HEARTBEATS = 2.5
COUNTS_WITHIN, TIMES_WITHIN = 0.03, 0.05
# a mean in seconds is compared where it is long enough for a per cent of it to be more than a clock's noise
_SHORTEST = 0.002


def parse(text: bytes) -> Metrics:
    """Values by name and labels as they stand in the text: ``name{a="b"}``."""
    metrics: Metrics = {}
    for line in text.decode().splitlines():
        if line and not line.startswith("#"):
            key, _, value = line.rpartition(" ")
            metrics[key.removeprefix("memoryllm_")] = float(value)
    return metrics


def total(metrics: Metrics, name: str, **labels: str) -> float:
    """The sum over all samples of ``name`` that have these labels."""
    wanted = [f'{label}="{value}"' for label, value in labels.items()]
    return math.fsum(
        value
        for key, value in metrics.items()
        if key.partition("{")[0] == name and all(label in key for label in wanted)
    )


def by_label(metrics: Metrics, name: str) -> dict[str, float]:
    """The samples of a metric with one label, by its value."""
    return {re.sub(r'.*="(.*)"}', r"\1", key): v for key, v in metrics.items() if key.startswith(name + "{")}


def since(before: Metrics, after: Metrics) -> Metrics:
    """What was added between two scrapes."""
    return {key: value - before.get(key, 0.0) for key, value in after.items()}


def mean_of(metrics: Metrics, name: str, **labels: str) -> float:
    """A histogram's mean; NaN if nothing was observed."""
    count = total(metrics, f"{name}_count", **labels)
    return total(metrics, f"{name}_sum", **labels) / count if count else math.nan


@dataclass
class Sample:
    """One second of a run. Bytes and seconds of processor time are of the API process and of the worker."""

    time: float
    metrics: Metrics
    resident: tuple[int, int]
    cpu: tuple[float, float]


@dataclass
class Watch:
    """Samples while a scenario runs."""

    client: Client
    server: Server
    samples: list[Sample] = field(default_factory=list)

    async def take(self) -> Sample | None:
        status, text = await self.client.get("/metrics")
        if status != 200:
            return None
        sample = Sample(
            time.monotonic(), parse(text), self.server.resident_bytes(), self.server.cpu_seconds()
        )
        self.samples.append(sample)
        return sample

    async def run(self) -> None:
        """Takes a sample a second until it is cancelled."""
        while True:
            began = time.monotonic()
            await self.take()
            await asyncio.sleep(max(0.0, began + SECOND - time.monotonic()))

    async def last(self) -> None:
        """The sample behind everything that has happened."""
        await asyncio.sleep(HEARTBEATS)
        await self.take()


@dataclass(frozen=True)
class Agreement:
    """One number as the client and as the server counted it."""

    what: str
    client: float
    server: float
    within: float

    @property
    def difference(self) -> float:
        if self.client == self.server:
            return 0.0
        return self.server / self.client - 1 if self.client else math.inf

    @property
    def good(self) -> bool:
        return abs(self.difference) <= self.within


def agreement(metrics: Metrics, answers: Sequence[Answer]) -> list[Agreement]:
    """What both sides know, over a whole run. Times are counted from sending: of lateness the server knows nothing."""
    rows: list[Agreement] = []

    def compare(what: str, client: float, server: float, within: float) -> None:
        rows.append(Agreement(what, client, server, within))

    for kind in ("generate", "update"):
        mine = [a for a in answers if a.kind == kind and a.status]
        compare(
            f"/{kind} answered with 200",
            sum(a.status == 200 for a in mine),
            total(metrics, "http_requests_total", route=f"/{kind}", status="200"),
            COUNTS_WITHIN,
        )
        compare(
            f"/{kind} refused or failed",
            sum(a.status != 200 for a in mine),
            total(metrics, "http_requests_total", route=f"/{kind}")
            - total(metrics, "http_requests_total", route=f"/{kind}", status="200"),
            COUNTS_WITHIN,
        )
    reads = [a for a in answers if a.kind == "generate" and a.status == 200]
    compare(
        "generated tokens",
        sum(a.tokens for a in reads),
        total(metrics, "generation_tokens_total"),
        COUNTS_WITHIN,
    )
    if reads and all(a.good for a in reads):
        # what a prompt had in tokens is known of those that were answered to the end
        compare(
            "prompt tokens",
            sum(a.prompt_tokens for a in reads),
            total(metrics, "prompt_tokens_total"),
            COUNTS_WITHIN,
        )
    compare(
        "blocks of updates",
        sum(a.blocks for a in answers if a.kind == "update"),
        total(metrics, "update_blocks_total"),
        COUNTS_WITHIN,
    )
    streamed = [a for a in reads if a.streamed and a.first]
    spans = [(a.last - a.first, a.tokens - 1) for a in streamed if a.tokens > 1]
    per_token = sum(s for s, _ in spans) / max(1, sum(n for _, n in spans))
    times: list[tuple[str, float, str]] = [
        (
            "mean time to first token",
            # who does not stream sees no first token, and is told of it
            mean([a.first - a.sent if a.streamed else a.first_token for a in reads if a.first]),
            "time_to_first_token_seconds",
        ),
        ("mean time per token", per_token, "inter_token_latency_seconds"),
        # those who hung up never came to an end
        (
            "mean of a whole generation",
            mean([a.end - a.sent for a in reads if not a.hung_up]),
            "e2e_request_latency_seconds",
        ),
    ]
    for what, client, name in times:
        server = mean_of(metrics, name)
        if client > _SHORTEST and not math.isnan(server):
            compare(f"{what}, s", client, server, TIMES_WITHIN)
    return rows
