"""A tenant with few requests beside one with very many: slots are kept for it, and others rest for its first token."""

from __future__ import annotations

from app.worker.scheduler import Limits
from tests.worker.simulation import Simulation

LIMITS = Limits(
    step_tokens=64, max_running=16, cache_rows=4000, queue_requests=10_000, queue_requests_tenant=10_000
)


def crowded() -> Simulation:
    simulation = Simulation(LIMITS)
    simulation.memories.here["light"] = False
    for _ in range(200):
        simulation.submit("hot", prompt=4, output=100)
    for _ in range(20):
        simulation.step()
    return simulation


def test_a_tenant_alone_leaves_an_eighth_of_the_slots() -> None:
    assert crowded().scheduler.counts["running"] == 14


def test_another_s_first_token_waits_for_no_one_s_end_and_comes_in_a_step_of_its_own() -> None:
    simulation = crowded()
    job = simulation.submit("light", prompt=10, output=5)
    plan = simulation.step()
    assert plan.start == [job]
    assert [chunk.job for chunk in plan.chunks] == [job]
    assert plan.decode == []
    # and in the next one all go on
    assert len(simulation.step().decode) == 15


def test_one_who_has_been_served_more_gets_the_slot_that_is_kept_from_a_crowd() -> None:
    simulation = crowded()
    job = simulation.submit("light", prompt=10, output=5)
    simulation.scheduler._counters.charge("light", 50.0)
    assert simulation.step().start == [job]


def test_those_who_rest_rest_for_one_step_however_long_the_prompt_is() -> None:
    simulation = crowded()
    simulation.submit("light", prompt=64 * 5, output=5)
    assert [len(simulation.step().decode) for _ in range(4)] == [0, 14, 0, 14]


def test_tenants_who_run_no_more_than_their_share_do_not_rest() -> None:
    simulation = Simulation(LIMITS)
    simulation.memories.here |= {"a": False, "b": False}
    for _ in range(20):
        for tenant in "ab":
            simulation.submit(tenant, prompt=4, output=100)
    for _ in range(20):
        simulation.step()
    running = {t: len(simulation.scheduler._running[t]) for t in "ab"}
    assert running == {"a": 8, "b": 8}
    simulation.cancel(simulation.scheduler.of("b")[0])
    before = set(simulation.resting)
    simulation.step()
    assert simulation.resting == before == set()


def test_an_update_s_context_makes_nobody_rest() -> None:
    simulation = crowded()
    simulation.submit("light", update=True, prompt=30)
    plan = simulation.step()
    assert plan.chunks
    assert len(plan.decode) == 14


def test_counters_of_those_who_left_are_forgotten_once_others_have_passed_them() -> None:
    """On a server that is never idle, with tenants that come once, take more than others, and never come again."""
    simulation = Simulation(LIMITS)
    most = 0
    for step in range(3000):
        while len(simulation.scheduler.of("always")) < 3:
            simulation.submit("always", prompt=20, output=10)
        if step % 5 == 0:
            simulation.submit(f"once {step}", prompt=60, output=5)
        simulation.step()
        if step > 500:
            most = max(most, len(simulation.scheduler._counters))
    counters = simulation.scheduler._counters
    assert most < 100
    assert len(counters._served) == len(counters._weights)
    assert len(counters._ahead) == len(counters._left) <= len(counters)
