"""The engine's side of fairness: what it tells the scheduler of weights and of memories that were brought."""

from __future__ import annotations

import pytest

from app.messages import Context, Generate, Request, RollbackTenant, Sampling, Score, Update
from app.worker.counters import Prices
from app.worker.scheduler import Limits
from tests.harness import Harness, load_backbone
from tests.worker.test_memories import PROMPT


def test_a_memory_that_is_brought_is_charged_to_its_tenant() -> None:
    harness = Harness(load_backbone("plain")[0], slots=1)
    harness.update("ada", list(range(20, 40)))
    harness.generate("bob", PROMPT)
    request = harness.begin_generate("ada", PROMPT, 50)
    counters = harness.engine.scheduler._counters
    while harness.engine.scheduler.waiting("ada"):
        harness.step()
    moved = harness.engine.residency.traffic.moved["in"]
    assert moved
    assert counters["ada"] >= Prices().swap / 2
    harness.run()
    assert harness.final(request)


@pytest.mark.parametrize("kind", ["generate", "score", "update"])
def test_the_weight_of_a_request_reaches_its_job(kind: str) -> None:
    harness = Harness(load_backbone("plain")[0])
    id = harness.id()
    message: Request = {
        "generate": Generate(id, "ada", PROMPT, Sampling(4), weight=3),
        "score": Score(id, "ada", PROMPT, PROMPT, weight=3),
        "update": Update(id, "ada", [Context(list(range(20, 40)))], weight=3),
    }[kind]
    harness.send(message)
    job = harness.engine.scheduler.get(id)
    assert job is not None
    assert job.weight == 3
    harness.run()


def test_the_priority_of_a_generation_reaches_its_job() -> None:
    harness = Harness(load_backbone("plain")[0])
    harness.send(Generate("first", "ada", PROMPT, Sampling(4), priority=3))
    harness.send(Score("second", "ada", PROMPT, PROMPT))
    jobs = [harness.engine.scheduler.get(id) for id in ("first", "second")]
    assert [job.priority for job in jobs if job is not None] == [3, 0]
    harness.run()


def test_a_rollback_leaves_the_weight_that_its_tenant_has() -> None:
    harness = Harness(load_backbone("plain")[0], limits=Limits(cache_rows=1024, max_running=1))
    harness.update("ada", list(range(20, 40)))
    blocking = harness.begin_generate("bob", PROMPT, 20)
    harness.step()
    counters = harness.engine.scheduler._counters
    harness.send(Generate(harness.id(), "ada", PROMPT, Sampling(4), weight=4))
    harness.send(RollbackTenant(harness.id(), "ada", 0))
    before = counters["ada"]
    counters.charge("ada", 8.0)
    assert counters["ada"] - before == 2.0
    harness.run()
    assert harness.final(blocking)


def test_the_gap_is_told_of_those_who_wait_for_others() -> None:
    """One runs, two wait, of whom one has been served 30 tokens more; who waits for his own update does not count."""
    harness = Harness(load_backbone("plain")[0], limits=Limits(cache_rows=1024, max_running=1))
    scheduler = harness.engine.scheduler
    harness.begin_generate("carol", PROMPT, 20)
    while scheduler.waiting("carol"):
        harness.step()
    harness.begin_generate("ada", PROMPT)
    harness.begin_generate("bob", PROMPT)
    gauge = lambda: harness.engine.stats().gauges["fairness_gap_tokens"]  # noqa: E731
    assert gauge() == 0.0
    scheduler._counters.charge("bob", 30.0)
    assert gauge() == 30.0
    scheduler._updating["bob"] = scheduler.of("bob")[0]
    assert gauge() == 0.0
    del scheduler._updating["bob"]
    harness.run()
