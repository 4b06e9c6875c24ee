"""What one plan of the scheduler costs, by how many requests wait: 64 run, and none of those that wait can begin."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

from app.worker.jobs import Job, Kind, Phase
from app.worker.scheduler import Limits, Scheduler

RUNNING, SLOTS, ROUNDS = 64, 80, 300


@dataclass(frozen=True)
class Slots:
    """The first ``SLOTS`` tenants' memories are there."""

    def readable(self, tenant: str) -> bool:
        return int(tenant) < SLOTS

    def resident(self, tenant: str) -> bool:
        return int(tenant) < SLOTS

    def moving(self, tenant: str) -> bool:
        return False

    def owed(self, tenant: str) -> bool:
        return False

    def outdated(self, tenant: str) -> bool:
        return False


def plan_microseconds(waiting: int, tenants: int) -> float:
    """Median of ``ROUNDS`` plans; ``waiting`` requests of ``tenants`` wait behind those that run."""
    scheduler, memories = Scheduler(Limits(queue_requests=10_000, queue_requests_tenant=10_000)), Slots()

    def submit(number: int, tenant: int) -> Job:
        job = Job(str(number), str(tenant), Kind.GENERATE, 16, float(number), 64, 16)
        scheduler.submit(job)
        return job

    running = [submit(number, number) for number in range(RUNNING)]
    while any(job.phase is not Phase.DECODE for job in running):
        for chunk in scheduler.plan(0.0, memories).chunks:
            if not chunk.job.remaining:
                chunk.job.phase = Phase.DECODE
    for number in range(waiting):
        submit(RUNNING + number, RUNNING + number % tenants)
    took = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        plan = scheduler.plan(0.0, memories)
        took.append(1e6 * (time.perf_counter() - began))
        assert not plan.start
    return statistics.median(took)


def report() -> None:
    for waiting in (32, 256, 2000):
        for tenants in sorted({16, waiting}):
            took = plan_microseconds(waiting, tenants)
            print(f"{waiting:>5} requests of {tenants:>4} tenants wait: {took:6.0f} µs a plan")
