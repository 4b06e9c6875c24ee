"""The scheduler's policy, with a virtual clock and memories that answer as they are told."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import ServerBusy, TenantBusy
from app.worker.jobs import Job, Kind, Phase, Plan
from app.worker.scheduler import PREFETCH, Limits, Scheduler

numbers = itertools.count()


@dataclass
class FakeMemories:
    here: set[str] = field(default_factory=set)
    coming: set[str] = field(default_factory=set)
    unused: set[str] = field(default_factory=set)
    old: set[str] = field(default_factory=set)

    def readable(self, tenant: str) -> bool:
        return tenant in self.here

    def resident(self, tenant: str) -> bool:
        return tenant in self.here

    def moving(self, tenant: str) -> bool:
        return tenant in self.coming

    def owed(self, tenant: str) -> bool:
        return tenant in self.unused

    def outdated(self, tenant: str) -> bool:
        return tenant in self.old


def generate(tenant: str, prompt: int = 10, room: int = 32, **rest: object) -> Job:
    return Job(f"j{next(numbers)}", tenant, Kind.GENERATE, prompt, 0.0, room, prompt, **rest)  # type: ignore[arg-type]


def update(tenant: str, length: int = 20, **rest: object) -> Job:
    return Job(f"j{next(numbers)}", tenant, Kind.UPDATE, length, 0.0, 0, length, **rest)  # type: ignore[arg-type]


def advance(plan: Plan) -> None:
    """What the engine does after a step: prompts that are complete decode, contexts are held."""
    for chunk in plan.chunks:
        if chunk.job.remaining == 0:
            chunk.job.phase = Phase.DECODE if chunk.job.kind is Kind.GENERATE else Phase.HELD


ALL = FakeMemories({"a", "b", "c", "d"})


def test_decode_comes_first_and_chunks_fill_the_budget() -> None:
    scheduler = Scheduler(Limits(step_tokens=16))
    first = generate("a", 5)
    scheduler.submit(first)
    advance(scheduler.plan(0, ALL))
    long = generate("b", 100, room=128)
    scheduler.submit(long)
    plan = scheduler.plan(1, ALL)
    assert plan.decode == [first]
    assert [(c.job, c.start, c.count) for c in plan.chunks] == [(long, 0, 15)]
    plan = scheduler.plan(2, ALL)
    assert [(c.start, c.count) for c in plan.chunks] == [(15, 15)]


def test_nothing_passes_an_update_of_its_tenant() -> None:
    scheduler = Scheduler(Limits())
    before, change, after, other = generate("a"), update("a"), generate("a"), generate("b")
    for job in (before, change, after, other):
        scheduler.submit(job)
    plan = scheduler.plan(0, ALL)
    assert set(plan.start) == {before, change, other}
    advance(plan)
    assert scheduler.plan(1, ALL).start == []
    scheduler.finish(change)
    assert scheduler.plan(2, ALL).start == [after]


def test_updates_of_one_tenant_run_one_by_one() -> None:
    scheduler = Scheduler(Limits())
    first, second = update("a"), update("a")
    scheduler.submit(first)
    scheduler.submit(second)
    assert scheduler.plan(0, ALL).start == [first]
    scheduler.finish(first)
    assert scheduler.plan(1, ALL).start == [second]


def test_an_atomic_context_is_never_cut() -> None:
    scheduler = Scheduler(Limits(step_tokens=16))
    decoding = [generate("a", 2) for _ in range(10)]
    for job in decoding:
        scheduler.submit(job)
    while any(j.phase is not Phase.DECODE for j in decoding):
        advance(scheduler.plan(0, ALL))
    whole = update("b", 12, atomic=True)
    scheduler.submit(whole)
    assert scheduler.plan(1, ALL).chunks == []
    for job in decoding[:5]:
        scheduler.finish(job)
    assert scheduler.plan(2, ALL).chunks == []
    scheduler.finish(decoding[5])
    assert [c.count for c in scheduler.plan(3, ALL).chunks] == [12]


def test_an_atomic_context_above_the_budget_still_runs_alone() -> None:
    scheduler = Scheduler(Limits(step_tokens=8))
    whole = update("a", 12, atomic=True)
    scheduler.submit(whole)
    assert [c.count for c in scheduler.plan(0, ALL).chunks] == [12]


def test_the_least_served_tenant_goes_first() -> None:
    scheduler = Scheduler(Limits(step_tokens=64, max_running=1))
    heavy = [generate("a", 60) for _ in range(3)]
    light = [generate("b", 5) for _ in range(3)]
    for job in (*heavy, *light):
        scheduler.submit(job)
    order = []
    while not scheduler.empty:
        plan = scheduler.plan(0, ALL)
        order += plan.start
        for job in plan.start:
            scheduler.finish(job)
    assert order == [heavy[0], *light, *heavy[1:]]


def test_idleness_earns_no_credit() -> None:
    scheduler = Scheduler(Limits(step_tokens=1000))
    busy = generate("a", 900, room=1000)
    scheduler.submit(busy)
    scheduler.plan(0, ALL)
    scheduler.submit(generate("b", 1))
    assert scheduler._counters["b"] == scheduler._counters["a"]


def test_a_cold_tenant_cannot_be_starved_by_resident_ones() -> None:
    """Residents that always have more to do must leave room in the end for one that has to be loaded."""
    scheduler = Scheduler(Limits(step_tokens=64, max_running=2))
    memories = FakeMemories({"a"})
    scheduler.submit(generate("cold", 10))
    for step in range(200):
        if len(scheduler.of("a")) < 2:
            scheduler.submit(generate("a", 60))
        plan = scheduler.plan(step, memories)
        advance(plan)
        assert ("cold", True) in plan.wanted
        for job in plan.decode:
            scheduler.finish(job)
        if not any(j.phase is not Phase.WAITING for j in scheduler.of("a")):
            return  # the slot of "a" could be taken now
    pytest.fail("the resident tenant never left room")


def test_several_memories_are_sent_for_while_others_run() -> None:
    """Of those who are next, in their order, and no more than are asked for at once."""
    scheduler = Scheduler(Limits())
    scheduler.submit(generate("here", 10))
    memories = FakeMemories({"here"})
    scheduler.plan(0, memories)
    for number in range(PREFETCH + 2):
        scheduler.submit(generate(f"cold {number}", 10))
    plan = scheduler.plan(1, memories)
    assert scheduler.counts["running"] == 1
    assert plan.wanted == [(f"cold {number}", True) for number in range(PREFETCH)]


def test_memories_are_sent_for_while_no_one_more_can_run() -> None:
    """Behind one whose memory is there, and who waits for the same place."""
    scheduler = Scheduler(Limits(max_running=1))
    memories = FakeMemories({"here", "there"})
    scheduler.submit(generate("here", 10))
    scheduler.plan(0, memories)
    scheduler.submit(generate("there", 10))
    scheduler.submit(generate("cold", 10))
    plan = scheduler.plan(1, memories)
    assert not plan.start
    assert plan.wanted == [("cold", True)]


def test_queues_are_bounded() -> None:
    scheduler = Scheduler(Limits(queue_requests=3, queue_requests_tenant=2, queue_tokens=50))
    scheduler.submit(generate("a"))
    scheduler.submit(generate("a"))
    with pytest.raises(TenantBusy):
        scheduler.submit(generate("a"))
    with pytest.raises(ServerBusy):
        scheduler.submit(generate("b", 40))
    scheduler.submit(generate("b", 10))
    with pytest.raises(ServerBusy):
        scheduler.submit(generate("c", 1))


def test_priority_orders_reads_within_a_tenant_but_not_past_an_update() -> None:
    scheduler = Scheduler(Limits(max_running=1))
    low, high, change, highest = (
        generate("a"), generate("a", priority=5), update("a"), generate("a", priority=9),
    )  # fmt: skip
    for job in (low, high, change, highest):
        scheduler.submit(job)
    order = []
    for step in range(4):
        (job,) = scheduler.plan(step, ALL).start
        order.append(job)
        scheduler.finish(job)
    assert order == [high, low, change, highest]


def test_expired_jobs_leave_wherever_they_are() -> None:
    scheduler = Scheduler(Limits(max_running=1))
    running, waiting = generate("a", deadline=5.0), generate("a", deadline=6.0)
    scheduler.submit(running)
    scheduler.submit(waiting)
    assert scheduler.plan(0, ALL).expired == []
    assert scheduler.plan(7, ALL).expired == [running, waiting]
    assert scheduler.empty


@given(
    st.lists(st.tuples(st.sampled_from("abcd"), st.booleans(), st.integers(1, 70)), max_size=25),
    st.integers(0, 9),
)
def test_every_job_is_served_in_order_within_the_limits(
    jobs: list[tuple[str, bool, int]], finish_after: int
) -> None:
    limits = Limits(step_tokens=20, max_running=3, cache_rows=100)
    scheduler = Scheduler(limits)
    memories = FakeMemories(set("ab"))
    submitted: dict[str, list[Job]] = {}
    for tenant, is_update, length in jobs:
        job = update(tenant, length) if is_update else generate(tenant, length, room=length + 5)
        submitted.setdefault(tenant, []).append(job)
        scheduler.submit(job)
    started: dict[str, list[Job]] = {}
    age: dict[Job, int] = {}
    for step in range(3000):
        if scheduler.empty:
            break
        plan = scheduler.plan(step, memories)
        for tenant, _ in plan.wanted:
            memories.here = {tenant, next(iter(memories.here))}
        for job in plan.start:
            started.setdefault(job.tenant, []).append(job)
        tokens = len(plan.decode) + sum(c.count for c in plan.chunks)
        assert tokens <= limits.step_tokens
        assert scheduler.counts["running"] <= limits.max_running
        assert sum(j.room for t in "abcd" for j in scheduler.of(t) if j.phase is not Phase.WAITING) <= 100
        advance(plan)
        for tenant in "abcd":
            for job in scheduler.of(tenant):
                if job.phase in (Phase.DECODE, Phase.HELD):
                    age[job] = age.get(job, 0) + 1
                    if age[job] > finish_after:
                        scheduler.finish(job)
    assert scheduler.empty, "a job was starved"
    assert started == submitted, "a tenant's jobs began out of order"
    assert scheduler._rows_used == scheduler._waiting_tokens == 0
    assert not len(scheduler._counters)


@pytest.mark.parametrize(
    ("memories", "starts"),
    [
        (FakeMemories({"rich"}), False),
        (FakeMemories({"rich"}, coming={"poor"}), True),
        (FakeMemories({"rich"}, unused={"rich"}), True),
        (FakeMemories({"rich", "poor"}), True),
    ],
)
def test_a_tenant_served_more_leaves_its_slot_to_one_that_finds_none(
    memories: FakeMemories, starts: bool
) -> None:
    scheduler = Scheduler(Limits())
    for tenant in ("rich", "poor"):
        scheduler.submit(generate(tenant))
    served = generate("rich", prompt=2000, room=4000)
    scheduler.submit(served)
    for _ in range(8):
        advance(scheduler.plan(0, FakeMemories({"rich"})))
    for job in scheduler.of("rich"):
        scheduler.finish(job)
    scheduler.submit(generate("rich"))
    plan = scheduler.plan(1, memories)
    assert ("rich" in {job.tenant for job in plan.start}) == starts


def test_who_waits_for_its_own_readers_holds_nobody_up() -> None:
    """Their memories were rolled back while they read them: nobody else can make room for what they wait for."""
    scheduler = Scheduler(Limits())
    slow = [f"slow {number}" for number in range(PREFETCH)]
    memories = FakeMemories({"rich", *slow})
    for tenant in slow:
        scheduler.submit(generate(tenant))
    advance(scheduler.plan(0, memories))
    memories.here, memories.old = {"rich"}, set(slow)
    for tenant in ("rich", "cold", *slow):
        scheduler.submit(generate(tenant))
    scheduler._counters.charge("rich", 3 * scheduler.prices.resident)
    scheduler._counters.charge("cold", 3 * scheduler.prices.resident)
    assert scheduler.fairness_gap(memories) == 0.0
    assert scheduler.wanted(memories) == [("cold", True)]
    plan = scheduler.plan(1, memories)
    assert [job.tenant for job in plan.start] == ["rich"]
    assert plan.wanted == [("cold", True)]
    memories.old = set()
    scheduler.submit(generate("rich"))
    assert scheduler.fairness_gap(memories) > scheduler.prices.resident
    plan = scheduler.plan(2, memories)
    assert not plan.start
    assert sorted(plan.wanted) == [(tenant, True) for tenant in slow]


def test_as_many_updates_are_at_work_as_there_is_memory_for() -> None:
    scheduler = Scheduler(Limits(step_tokens=16, updates=2))
    jobs = [update(tenant, 24) for tenant in "abcd"]
    for job in jobs:
        scheduler.submit(job)
    ended = 0
    for step in range(60):
        advance(scheduler.plan(step, ALL))
        assert sum(job.working for job in jobs if scheduler.get(job.id)) <= 2
        held = [job for job in jobs if scheduler.get(job.id) and job.phase is Phase.HELD]
        # a block is on its way for a while; one whose block is no longer on the device has made room
        if step % 5 == 4 and held:
            held[0].working = False
        if step % 10 == 9 and held:
            scheduler.finish(held[0])
            ended += 1
    assert ended == 4


@pytest.mark.parametrize(("budget", "together"), [(100, 2), (90, 1), (150, 3), (30, 1)])
def test_updates_that_begin_in_one_step_have_room_for_their_tails(budget: int, together: int) -> None:
    """But for the first, so that a budget below one tail stops no update."""
    scheduler = Scheduler(Limits(step_tokens=budget))
    for tenant in "abcd":
        scheduler.submit(update(tenant, 10, tail=40))
    plan = scheduler.plan(0, ALL)
    assert [chunk.count for chunk in plan.chunks] == [10] * together
    advance(plan)
    assert len(scheduler.plan(1, ALL).chunks) == min(together, 4 - together)


def test_a_tail_is_read_once() -> None:
    scheduler = Scheduler(Limits(step_tokens=60))
    for tenant in "ab":
        scheduler.submit(update(tenant, 100, tail=40))
    counts = [[chunk.count for chunk in scheduler.plan(step, ALL).chunks] for step in range(4)]
    assert counts == [[60], [60], [40, 20], [20]]


def test_a_few_rebuilds_at_once_and_nobody_else_waits_for_them() -> None:
    scheduler = Scheduler(Limits(rebuilds=2))
    rebuilds = [update(tenant, 0, rebuilds=True, needs_memory=False, held_first=True) for tenant in "abc"]
    for job in rebuilds:
        scheduler.submit(job)
    assert scheduler.plan(0, ALL).start == rebuilds[:2]
    scheduler.submit(generate("d"))
    scheduler._counters.charge("d", 10_000.0)
    assert scheduler.fairness_gap(ALL) == 0.0
    assert [job.tenant for job in scheduler.plan(1, ALL).start] == ["d"]
    scheduler.finish(rebuilds[0])
    assert scheduler.plan(2, ALL).start == [rebuilds[2]]
