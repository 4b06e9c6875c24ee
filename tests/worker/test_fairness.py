"""The engine's side of fairness: what it tells the scheduler of weights and of memories that were brought."""

from __future__ import annotations

import pytest

from app.messages import Context, Generate, Request, Sampling, Score, Update
from app.worker.counters import Prices
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
    assert harness.engine.stats().gauges["fairness_gap_tokens"] == 0.0
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
