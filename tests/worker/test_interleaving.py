"""Any interleaving of several tenants' requests gives each tenant what it would get alone."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.messages import Finished, Scored, Updated
from app.model.backbone import Backbone
from app.worker.scheduler import Limits
from tests.harness import NAMES, Harness, load_backbone

TOLERANCE = 1e-4
LIMITS = Limits(step_tokens=24, max_running=5, cache_rows=512)


@cache
def backbone_of(name: str) -> Backbone:
    return load_backbone(name)[0]


tokens = st.integers(3, 319)


def contexts(backbone: Backbone) -> st.SearchStrategy[list[int]]:
    # a memory that is not initialised takes no context shorter than K
    shortest = 4 if backbone.weights.initialized else backbone.config.num_tokens
    return st.lists(tokens, min_size=shortest, max_size=60)


def operations(backbone: Backbone) -> st.SearchStrategy[list[tuple]]:  # type: ignore[type-arg]
    tenant = st.sampled_from(["ada", "bob", "cyd"])
    text = st.lists(tokens, min_size=1, max_size=40)
    update = st.tuples(st.just("update"), tenant, st.lists(contexts(backbone), min_size=1, max_size=3))
    generate = st.tuples(st.just("generate"), tenant, text, st.integers(1, 20))
    score = st.tuples(st.just("score"), tenant, text, st.lists(tokens, min_size=1, max_size=12))
    pause = st.tuples(st.just("pause"), st.integers(1, 6))
    return st.lists(st.one_of(update, generate, score, pause), min_size=1, max_size=14)


def begin(harness: Harness, operation: tuple) -> str:  # type: ignore[type-arg]
    kind, tenant, *rest = operation
    if kind == "update":
        return harness.begin_update(tenant, *rest[0])
    if kind == "generate":
        return harness.begin_generate(tenant, rest[0], rest[1], logprobs=0)
    return harness.begin_score(tenant, rest[0], rest[1])


def outcome(harness: Harness, request_id: str) -> tuple[list[int], list[float], int]:
    """Tokens, log-probabilities and memory version of a finished request."""
    final = harness.final(request_id)
    if isinstance(final, Scored):
        return final.greedy, final.logprobs, final.memory_version
    if isinstance(final, Updated):
        return [], [], final.memory_version
    assert isinstance(final, Finished), final
    logprobs = [p.logprob for a in harness.of(request_id) for p in getattr(a, "logprobs", None) or []]
    return harness.tokens(request_id), logprobs, final.memory_version


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_each_tenant_gets_what_it_would_get_alone(name: str, data: st.DataObject) -> None:
    backbone = backbone_of(name)
    plan = data.draw(operations(backbone))
    slots, warm = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([0, 10**9]))
    together = Harness(
        backbone,
        slots=slots,
        hot=slots + 1,
        warm_bytes=warm,
        limits=LIMITS,
        compacted_after=3,
        plans_ahead=data.draw(st.booleans()),
    )
    begun: list[tuple[tuple, str]] = []  # type: ignore[type-arg]
    for operation in plan:
        if operation[0] == "pause":
            for _ in range(operation[1]):
                together.step()
        else:
            begun.append((operation, begin(together, operation)))
    together.run()
    for tenant in ("ada", "bob", "cyd"):
        alone = Harness(backbone, slots=1, hot=1)
        for operation, request_id in begun:
            if operation[1] != tenant:
                continue
            own = begin(alone, operation)
            alone.run()
            expected, got = outcome(alone, own), outcome(together, request_id)
            assert got[0] == expected[0]
            assert got[2] == expected[2]
            assert got[1] == pytest.approx(expected[1], abs=TOLERANCE)
