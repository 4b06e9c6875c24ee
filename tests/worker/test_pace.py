"""Updates beside generations: no more than their share of the time, and no less where they want it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.worker.jobs import Job, Kind, Phase, Plan
from app.worker.pace import Pace, Spent
from app.worker.scheduler import Limits, Scheduler
from tests.harness import Harness, load_backbone
from tests.worker.simulation import Slots
from tests.worker.test_memories import PROMPT


@dataclass(frozen=True)
class Device:
    """What a step, a row of decode, a token of a prompt or a context, and publishing a block cost, in seconds."""

    fixed: float = 0.0
    row: float = 0.001
    token: float = 0.0002
    publishing: float = 0.005


class Server:
    """Readers and writers who ask again at once, in virtual seconds. Generations never end, updates in one step."""

    def __init__(self, device: Device, share: float, readers: int, writers: int) -> None:
        self.device = device
        self.scheduler = Scheduler(Limits(update_share=share))
        self.memories = Slots(1000, 0, {f"{n}": False for n in range(-readers, writers)})
        self.seconds = self.beside = 0.0
        self.for_updates = 0.0
        self.tokens = self.updates = 0
        self.join(readers)
        self.writers = 0
        self.write(writers)

    def write(self, writers: int) -> None:
        self.writers = writers
        for number in range(writers):
            self.memories.here[f"{number}"] = False
            self.submit(Kind.UPDATE, number, 50)

    def join(self, readers: int) -> None:
        for number in range(-readers, 0):
            if not self.scheduler.of(f"{number}"):
                self.memories.here[f"{number}"] = False
                self.submit(Kind.GENERATE, number, 4)

    def submit(self, kind: Kind, tenant: int, length: int) -> Job:
        job = Job(f"{tenant} {self.updates}", f"{tenant}", kind, length, self.seconds)
        self.scheduler.submit(job)
        return job

    def step(self) -> Plan:
        device, plan = self.device, self.scheduler.plan(self.seconds, self.memories)
        prompts = sum(chunk.count for chunk in plan.chunks if chunk.job.reads)
        updates = sum(chunk.count for chunk in plan.chunks if not chunk.job.reads)
        seconds = device.fixed + device.row * len(plan.decode) + device.token * (prompts + updates)
        self.for_updates += device.token * updates + self.beside
        reading = bool(plan.decode or prompts)
        self.scheduler.pace.spent(
            Spent(len(plan.decode), prompts, updates, seconds, self.beside), reading=reading
        )
        self.seconds += seconds
        self.tokens += len(plan.decode)
        self.beside = 0.0
        for job in [chunk.job for chunk in plan.chunks if not chunk.job.remaining]:
            if job.reads:
                job.phase = Phase.DECODE
                continue
            self.scheduler.finish(job)
            self.beside += device.publishing
            self.seconds += device.publishing
            self.updates += 1
            if int(job.tenant) < self.writers:
                self.submit(Kind.UPDATE, int(job.tenant), 40 + self.updates % 20)
        return plan

    def play(self, steps: int) -> Server:
        for _ in range(steps):
            self.step()
        self.seconds, self.tokens, self.updates, self.for_updates = 0.0, 0, 0, 0.0
        for _ in range(steps):
            self.step()
        return self

    @property
    def per_token(self) -> float:
        return self.seconds / self.tokens


devices = st.builds(
    Device,
    fixed=st.sampled_from([0.0, 0.005, 0.03]),
    row=st.floats(0.0003, 0.003),
    token=st.floats(0.00005, 0.0004),
    publishing=st.floats(0.0, 0.01),
)


@settings(max_examples=25, deadline=None)
@given(devices, st.integers(1, 24), st.sampled_from([0.25, 0.5]))
def test_a_storm_of_updates_takes_no_more_than_its_share(device: Device, readers: int, share: float) -> None:
    calm = device.row + device.fixed / readers
    storm = Server(device, share, readers, 16).play(400)
    assert storm.per_token / calm < 1.1 / (1 - share)
    # and the updates have what is theirs, or as many whole contexts as find room in each step
    cost = 50 * device.token + device.publishing
    alone = readers * calm
    room = min(max(64, int(alone / device.token)), Limits().step_tokens - readers)
    contexts = min(16, max(1, room // 59))
    most = contexts * cost / (alone + contexts * cost)
    assert storm.updates * cost > 0.75 * min(share, most) * storm.seconds


@pytest.mark.parametrize("at_first", [1, 48])
@pytest.mark.parametrize(
    "device",
    [
        Device(0.005, 0.0004, 0.0002, 0.001),
        Device(0.02, 0.0, 0.0002, 0.002),
        Device(0.02, 0.0004, 0.0003, 0.0),
        Device(0.0, 0.001, 0.0002, 0.005),
    ],
)
def test_the_share_is_kept_when_others_read_than_were_measured(device: Device, at_first: int) -> None:
    """What a step of another number of rows takes is known only once one of them was without contexts."""
    server = Server(device, 0.25, at_first, 0)
    for _ in range(100):
        server.step()
    for number in range(-at_first, -8):
        server.scheduler.finish(server.scheduler.of(f"{number}")[0])
    server.join(32 if at_first == 1 else 8)
    server.write(16)
    server.play(300)
    assert 0.2 < server.for_updates / server.seconds < 0.3


def test_the_share_is_kept_where_no_step_is_decode_alone() -> None:
    pace, of_updates, of_all = Pace(0.25), 0.0, 0.0
    pace.spent(Spent(1, 0, 0, 0.0054), reading=True)
    for _ in range(400):
        contexts = 64 if pace.room(32) else 0
        seconds = 0.0178 + 0.0002 * (10 + contexts)
        pace.spent(Spent(32, 10, contexts, seconds), reading=True)
        of_updates, of_all = of_updates + 0.0002 * contexts, of_all + seconds
    assert 0.2 < of_updates / of_all < 0.3


def test_now_and_then_a_step_has_no_contexts_even_where_nothing_is_owed() -> None:
    pace = Pace(0.25)
    pace.spent(Spent(8, 0, 0, 0.010), reading=True)
    rooms = []
    for _ in range(90):
        rooms.append(pace.room(8))
        # a context for nothing, or a prompt, which tells nothing of decode alone
        pace.spent(Spent(8, 0 if rooms[-1] else 4, 1 if rooms[-1] else 0, 0.010), reading=True)
    assert rooms.count(0) == 10
    # the next is planned while that one runs
    while pace.room(8):
        pace.spent(Spent(8, 0, 1, 0.010), reading=True)
    pace.begun(8, 0)
    assert pace.room(8)
    # where nobody reads nothing is to be measured
    for _ in range(20):
        pace.spent(Spent(0, 0, 50, 0.010), reading=False)
    assert pace.room(8)


def test_without_a_bound_the_same_storm_takes_nearly_all() -> None:
    assert Server(Device(), 1.0, 8, 16).play(50).per_token > 4 * Device().row


def test_where_nobody_reads_updates_have_everything() -> None:
    server = Server(Device(), 0.25, 8, 16).play(50)
    for number in range(-8, 0):
        for job in server.scheduler.of(f"{number}"):
            server.scheduler.finish(job)
    server.step()
    assert all(len(server.step().chunks) >= 8 for _ in range(20))


def test_one_step_that_took_an_hour_stops_updates_for_a_second() -> None:
    pace = Pace(0.25)
    pace.spent(Spent(8, 0, 0, 0.01), reading=True)
    pace.spent(Spent(8, 0, 50, 3600.0), reading=True)
    waited = 0.0
    while not pace.room(8):
        pace.spent(Spent(8, 0, 0, 0.01), reading=True)
        waited += 0.01
    assert 0.9 < waited < 1.1


def test_an_atomic_context_longer_than_its_room_beside_readers_has_its_turn() -> None:
    server = Server(Device(), 0.25, 1, 0)
    job = server.submit(Kind.UPDATE, 1, 300)
    job.atomic = True
    server.memories.here["1"] = False
    for _ in range(20):
        server.step()
    assert server.updates == 1


def crowd(company: bool) -> tuple[Scheduler, list[Job]]:
    """One tenant's 40 sequences of a millisecond a row each, and perhaps another tenant that waits for its memory."""
    scheduler, memories = Scheduler(Limits()), Slots(1, 0, {"hot": False})
    jobs = [Job(f"{n}", "hot", Kind.GENERATE, 4, 0.0) for n in range(40)]
    for job in jobs:
        scheduler.submit(job)
    scheduler.plan(0.0, memories)
    for job in jobs:
        job.phase = Phase.DECODE
    scheduler.pace.spent(Spent(40, 0, 0, 0.04), reading=True)
    if company:
        scheduler.submit(Job("other", "other", Kind.GENERATE, 4, 0.0))
    return scheduler, jobs


def test_in_company_many_sequences_of_one_tenant_decode_in_turns() -> None:
    scheduler, jobs = crowd(company=True)
    memories = Slots(1, 0, {"hot": False})
    had: Counter[str] = Counter()
    for step in range(40):
        plan = scheduler.plan(0.1 * step, memories)
        assert len(plan.decode) == 20
        had.update(job.id for job in plan.decode)
        # none of them waits for longer than a round
        assert max(had[job.id] for job in jobs) - min(had[job.id] for job in jobs) <= 1
    assert scheduler._counters["hot"] == 40 * 4 + 40 * 20 * scheduler.prices.output
    # a while after the other has gone, nobody is there to wait for the end of a step
    scheduler.finish(scheduler.of("other")[0])
    assert len(scheduler.plan(10.0, memories).decode) == 20
    assert len(scheduler.plan(20.0, memories).decode) == 40


def test_alone_all_sequences_decode_in_every_step() -> None:
    scheduler, _ = crowd(company=False)
    assert len(scheduler.plan(0.0, Slots(1, 0, {"hot": False})).decode) == 40


def test_however_slow_a_device_is_a_few_decode_together() -> None:
    pace = Pace(0.25)
    assert pace.rows(0.02) > 1000
    pace.spent(Spent(10, 0, 0, 10.0), reading=True)
    assert pace.rows(0.02) == 8


def test_the_engine_tells_where_its_time_went() -> None:
    harness = Harness(load_backbone("plain")[0])
    told: list[tuple[Spent, bool]] = []
    spent = harness.engine.scheduler.pace.spent

    def note(step: Spent, *, reading: bool) -> None:
        told.append((step, reading))
        spent(step, reading=reading)

    harness.engine.scheduler.pace.spent = note  # type: ignore[method-assign]
    harness.generate("ada", PROMPT, 6)
    assert sum(step.prompts for step, _ in told) == len(PROMPT)
    assert sum(step.rows for step, _ in told) == 5
    assert all(reading and step.seconds > 0 and not step.updates for step, reading in told)
    told.clear()
    harness.update("bob", list(range(20, 40)))
    assert sum(step.updates for step, _ in told) == 20 + harness.engine.backbone.config.num_tokens
    assert not any(reading for _, reading in told)
    told.clear()
    harness.generate("ada", PROMPT, 6)
    # publishing comes behind the step that it belongs to
    assert told[0][0].beside > 0
    assert not any(step.beside for step, _ in told[1:])


def test_a_step_that_has_begun_counts_before_it_is_spent() -> None:
    pace = Pace(0.25)
    pace.spent(Spent(10, 0, 0, 0.010), reading=True)
    assert pace.room(10) > 0
    # nothing is known of what contexts cost
    pace.begun(10, 50)
    assert pace.room(10) == 0
    pace.spent(Spent(10, 0, 50, 0.020), reading=True)
    # 10 ms of them owe 30, of which that step's own rows have paid 10
    assert pace.room(10) == 0
    for _ in range(2):
        pace.begun(10, 0)
        pace.spent(Spent(10, 0, 0, 0.0099), reading=True)
    assert pace.room(10) == 0
    pace.begun(10, 0)
    assert pace.room(10) > 0, "the step that runs pays the rest"
