"""The scheduler's policy: which jobs get which tokens of the next step. Pure: no torch, no I/O, no clock.

Every step takes one decode token for each running sequence and fills the rest of the token budget with
chunks of prompts and update contexts of any tenants. Within a tenant jobs begin in order of arrival, and
what comes after an update waits until that update is published. Between tenants the least served goes
first, by virtual token counters (Sheng et al., Fairness in Serving Large Language Models, 2024); a tenant
whose memory is resident is preferred within a bound, so that a cold one cannot starve.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from app.errors import ServerBusy, TenantBusy
from app.worker.jobs import Chunk, Job, Kind, Phase, Plan

PREFETCH = 4
"""Memories a plan asks to be brought at most: those of the tenants that are next."""


@dataclass(frozen=True)
class Limits:
    """Bounds of a step and of the queues; all in tokens or requests."""

    step_tokens: int = 512
    max_running: int = 64
    cache_rows: int = 131_072
    queue_requests: int = 1024
    queue_requests_tenant: int = 128
    queue_tokens: int = 4_000_000


@dataclass(frozen=True)
class Prices:
    """What a tenant's counter is charged, in prompt tokens. ``resident`` is the bound of the preference."""

    prompt: float = 1.0
    output: float = 2.0
    update: float = 1.0
    resident: float = 512.0


class Memories(Protocol):
    """What the scheduler asks about tenants' memories."""

    def readable(self, tenant: str) -> bool: ...

    def resident(self, tenant: str) -> bool: ...

    def moving(self, tenant: str) -> bool:
        """Whether it is being brought."""
        ...

    def owed(self, tenant: str) -> bool:
        """Whether it was brought for a request that has not begun."""
        ...


class Scheduler:
    """Holds every job that waits or runs."""

    def __init__(self, limits: Limits, prices: Prices | None = None) -> None:
        self.limits = limits
        self.prices = prices or Prices()
        self._queues: dict[str, deque[Job]] = {}
        self._running: dict[str, dict[str, Job]] = {}
        self._updating: dict[str, Job] = {}
        self._jobs: dict[str, Job] = {}
        self._served: dict[str, float] = {}
        self._rows_used = 0
        self._waiting_tokens = 0

    # ------------------------------------------------------------ coming and going

    def submit(self, job: Job) -> None:
        """Puts a job at the end of its tenant's queue. Raises TenantBusy or ServerBusy over the bounds."""
        own = len(self._queues.get(job.tenant, ())) + len(self._running.get(job.tenant, ()))
        if own >= self.limits.queue_requests_tenant:
            raise TenantBusy("this tenant has too many requests waiting", retry_after=1.0)
        if len(self._jobs) >= self.limits.queue_requests:
            raise ServerBusy("too many requests are waiting", retry_after=1.0)
        if self._waiting_tokens + job.waiting_tokens > self.limits.queue_tokens and self._jobs:
            raise ServerBusy("too many tokens are waiting", retry_after=2.0)
        if not own:
            # an idle tenant's counter is lifted to the active minimum: idleness earns no credit
            active = [self._served[t] for t in self._active() if t != job.tenant]
            floor = min(active, default=max(self._served.values(), default=0.0))
            self._served[job.tenant] = max(self._served.get(job.tenant, 0.0), floor)
        self._queues.setdefault(job.tenant, deque()).append(job)
        self._jobs[job.id] = job
        self._waiting_tokens += job.waiting_tokens

    def get(self, job_id: str) -> Job | None:
        return self._jobs.get(job_id)

    def all(self) -> list[Job]:
        return list(self._jobs.values())

    def of(self, tenant: str) -> list[Job]:
        """The tenant's jobs, running ones first."""
        return [*self._running.get(tenant, {}).values(), *self._queues.get(tenant, ())]

    def finish(self, job: Job) -> None:
        """Takes a job out, wherever it is: completed, cancelled or failed."""
        if self._jobs.pop(job.id, None) is None:
            return
        if job.phase is Phase.WAITING:
            self._queues[job.tenant].remove(job)
            self._waiting_tokens -= job.waiting_tokens
        else:
            del self._running[job.tenant][job.id]
            self._rows_used -= job.room
            if job.kind is Kind.UPDATE:
                del self._updating[job.tenant]
        for table in (self._queues, self._running):
            if not table.get(job.tenant, True):
                del table[job.tenant]
        if job.tenant not in self._queues and job.tenant not in self._running:
            self._trim(job.tenant)

    def _trim(self, tenant: str) -> None:
        """Forgets the counter of an idle tenant that is below the active minimum: it would be lifted anyway."""
        active = [self._served[t] for t in self._active()]
        if not active or self._served[tenant] <= min(active):
            if not active:
                self._served.clear()
            else:
                del self._served[tenant]

    def _active(self) -> Iterable[str]:
        return self._queues.keys() | self._running.keys()

    def waiting(self, tenant: str) -> bool:
        """Whether any of the tenant's jobs waits."""
        return tenant in self._queues

    @property
    def empty(self) -> bool:
        return not self._jobs

    @property
    def counts(self) -> dict[str, int]:
        running = sum(len(jobs) for jobs in self._running.values())
        return {"running": running, "waiting": len(self._jobs) - running}

    # ------------------------------------------------------------ the plan

    def plan(self, now: float, memories: Memories) -> Plan:
        """The next step. Jobs in ``plan.start`` have been moved to running; the caller carries it out."""
        plan = Plan(expired=[j for j in self._jobs.values() if j.deadline is not None and j.deadline <= now])
        for job in plan.expired:
            self.finish(job)
        self._admit(plan, memories)
        budget = self.limits.step_tokens
        prefill: list[Job] = []
        for jobs in self._running.values():
            for job in jobs.values():
                if job.phase is Phase.DECODE:
                    plan.decode.append(job)
                    self._charge(job, 1, self.prices.output)
                elif job.phase is Phase.PREFILL:
                    prefill.append(job)
        budget -= len(plan.decode)
        prefill.sort(key=lambda job: (self._served[job.tenant], job.arrival))
        for job in prefill:
            # an empty step must move something, so that a budget below one context cannot stop an update
            room = budget if not (plan.idle and job.atomic) else max(budget, job.remaining)
            count = min(job.remaining, room)
            if count <= 0 or (job.atomic and count < job.remaining):
                continue
            plan.chunks.append(Chunk(job, job.done, count))
            job.done += count
            budget -= count
            self._charge(job, count, self.prices.prompt if job.reads else self.prices.update)
        return plan

    def _charge(self, job: Job, tokens: int, price: float) -> None:
        self._served[job.tenant] += tokens * price

    def wanted(self, memories: Memories) -> list[tuple[str, bool]]:
        """The memories that the next plan would have brought, as ``Plan.wanted``."""
        heads: list[tuple[float, float, str]] = []
        for tenant in self._queues:
            self._push(heads, tenant, memories)
        wanted: list[tuple[str, bool]] = []
        while heads and len(wanted) < PREFETCH:
            _, _, tenant = heapq.heappop(heads)
            job = self._head(tenant)
            assert job is not None
            if not _ready(job, memories):
                wanted.append((tenant, job.reads))
        return wanted

    def _admit(self, plan: Plan, memories: Memories) -> None:
        """Starts waiting jobs, least served tenant first, and names the memories that must be brought."""
        running = sum(len(jobs) for jobs in self._running.values())
        blocked = stuck = float("inf")
        full = False
        heads: list[tuple[float, float, str]] = []
        for tenant in self._queues:
            self._push(heads, tenant, memories)
        while heads:
            _, _, tenant = heapq.heappop(heads)
            job = self._head(tenant)
            assert job is not None
            if not _ready(job, memories):
                if len(plan.wanted) < PREFETCH:
                    plan.wanted.append((tenant, job.reads))
                # room for a tenant that waits is made by starting nothing for those served much more
                blocked = min(blocked, self._served[tenant] + self.prices.resident)
                if not memories.moving(tenant):
                    stuck = min(stuck, blocked)
                continue
            full = full or running >= self.limits.max_running
            # nobody may overtake for cache rows, or a long prompt would wait for ever
            full = full or self._rows_used + job.room > self.limits.cache_rows
            # when nothing runs, only a memory that finds no slot holds others back: they leave theirs, all but those
            # who have not had their turn since they were brought
            bound = blocked if running else stuck
            if full or (self._served[tenant] > bound and (running or not memories.owed(tenant))):
                continue
            self._start(plan, job)
            running += 1
            if tenant in self._queues:
                self._push(heads, tenant, memories)

    def _push(self, heads: list[tuple[float, float, str]], tenant: str, memories: Memories) -> None:
        """Adds the tenant's next job to the heap of candidates: least served first, residents preferred."""
        job = self._head(tenant)
        if job is not None:
            bonus = self.prices.resident if _ready(job, memories) else 0.0
            heapq.heappush(heads, (self._served[tenant] - bonus, job.arrival, tenant))

    def _head(self, tenant: str) -> Job | None:
        """The tenant's next job in order, if it may begin: nothing starts behind an unfinished update."""
        if tenant in self._updating:
            return None
        queue = self._queues[tenant]
        first = queue[0]
        if first.kind is Kind.UPDATE:
            return first
        best = first
        for job in queue:
            if job.kind is Kind.UPDATE:
                break
            if job.priority > best.priority:
                best = job
        return best

    def _start(self, plan: Plan, job: Job) -> None:
        queue = self._queues[job.tenant]
        queue.remove(job)
        if not queue:
            del self._queues[job.tenant]
        self._waiting_tokens -= job.waiting_tokens
        self._running.setdefault(job.tenant, {})[job.id] = job
        self._rows_used += job.room
        if job.kind is Kind.UPDATE:
            self._updating[job.tenant] = job
        job.phase = Phase.HELD if job.held_first else Phase.PREFILL
        plan.start.append(job)


def _ready(job: Job, memories: Memories) -> bool:
    if not job.needs_memory:
        return True
    return memories.readable(job.tenant) if job.reads else memories.resident(job.tenant)
