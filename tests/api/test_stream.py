"""What a request is handed: answers in order, those of a reader who is behind together, and first answers first."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from app.api.generate import Output
from app.api.metrics import Metrics
from app.api.schemas import GenerateBody
from app.api.stream import Stream
from app.api.worker import WorkerClient
from app.errors import ClientTooSlow, ServiceError, StoreFailed
from app.messages import Answer, Decoded, Finished, Generate, Sampling, Timings, TokenLogprob, Tokens
from tests.api.test_admission import IDS, bounded, check_refused, ended, hold

pytestmark = pytest.mark.anyio


def finished(id: str) -> Finished:
    return Finished(id, "length", 3, 4, 5, Timings(0.0, 0.0))


def opened(client: WorkerClient, id: str) -> Stream:
    stream = client.open(Generate(id, "ann", IDS, Sampling(8)))
    client._open[id] = stream
    return stream


async def test_tokens_that_have_come_meanwhile_are_handed_over_together() -> None:
    stream = opened(WorkerClient(), "a")
    said = [TokenLogprob(-0.5, []), TokenLogprob(-1.5, []), TokenLogprob(-2.5, [])]
    for number in range(3):
        stream.put(Tokens("a", [5 + number], [said[number]], 7 if number == 0 else None))
    assert await stream.next() == Tokens("a", [5, 6, 7], said, 7)
    stream.put(Tokens("a", [8]))
    assert await stream.next() == Tokens("a", [8])
    stream.put(Tokens("a", [9]))
    stream.put(finished("a"))
    assert await stream.next() == Tokens("a", [9])
    assert await stream.next() == finished("a")


async def test_tokens_before_an_error_are_handed_over_before_it() -> None:
    stream = opened(WorkerClient(), "a")
    stream.put(Tokens("a", [5]))
    stream.put(StoreFailed("no"))
    assert await stream.next() == Tokens("a", [5])
    with pytest.raises(ServiceError):
        await stream.next()


async def test_one_who_waits_is_woken_by_what_comes() -> None:
    stream = opened(WorkerClient(), "a")
    for number in range(3):
        waiting = asyncio.create_task(stream.next())
        await asyncio.sleep(0)
        assert not waiting.done()
        stream.put(Tokens("a", [number]))
        assert await waiting == Tokens("a", [number])


def test_a_token_more_is_a_gap_more_whoever_was_behind() -> None:
    metrics = Metrics()
    output = Output(None, GenerateBody(tenant="ann", prompt=IDS), metrics, 0.0)
    stream = opened(WorkerClient(), "a")
    for tokens in ([5, 6], [7, 8, 9], [10]):
        output.take(Tokens("a", tokens), stream)
    counts = {
        sample.name.removeprefix("memoryllm_"): sample.value
        for metric in metrics.registry.collect()
        for sample in metric.samples
    }
    assert counts["time_to_first_token_seconds_count"] == 1
    assert counts["inter_token_latency_seconds_count"] == 5


async def test_first_answers_are_handed_on_before_the_next_ones_of_others() -> None:
    client = WorkerClient()
    order: list[str] = []

    async def read(stream: Stream) -> None:
        while isinstance(await stream.next(), Tokens):
            order.append(stream.request.id)

    readers = [asyncio.create_task(read(opened(client, id))) for id in ("a", "b", "new")]
    await asyncio.sleep(0)
    client.received([Tokens("a", [1]), Tokens("b", [1])], 0.0)
    await asyncio.sleep(0.01)
    order.clear()
    frame: list[Answer] = [
        Tokens("a", [2]),
        finished("a"),
        Tokens("b", [2]),
        Tokens("new", [1]),
        finished("new"),
    ]
    client.received(frame, 0.0)
    await asyncio.sleep(0.01)
    assert order == ["new", "a", "b"]
    client.received([finished("b")], 0.0)
    await asyncio.gather(*readers)


async def test_tokens_of_a_step_reach_their_generations() -> None:
    client = WorkerClient()
    one, other = opened(client, "a"), opened(client, "b")
    client.received([Tokens("a", [1], None, 7), Decoded(["a", "gone", "b"], [2, 9, 3])], 0.0)
    client.received([Decoded(["b", "a"], [5, 4]), finished("a")], 0.0)
    assert await one.next() == Tokens("a", [1, 2, 4], None, 7)
    assert await one.next() == finished("a")
    assert await other.next() == Tokens("b", [3, 5])
    other.backlog = 1
    client.received([Decoded(["b"], [6]), Decoded(["b"], [7])], 0.0)
    assert await other.next() == Tokens("b", [6])
    with pytest.raises(ClientTooSlow):
        await other.next()


async def test_who_has_no_place_left_is_refused_before_his_request_is_looked_at(model_dir: Path) -> None:
    async with bounded(model_dir, queue_requests_tenant=1) as service:
        call = hold(service, "mute")
        await service.until_seen(Generate, 1)
        senseless = {"prompt": IDS, "max_tokens": -1}
        check_refused(
            await service.post("/generate", {"tenant": "mute", **senseless}), 429, "tenant_queue_full"
        )
        assert (await service.post("/generate", {"tenant": "ann", **senseless})).status_code == 422
        for tenant in (None, 7, ["mute"]):
            assert (await service.post("/generate", {"tenant": tenant, **senseless})).status_code == 422
        await ended(call)
        assert (await service.post("/generate", {"tenant": "mute", **senseless})).status_code == 422
