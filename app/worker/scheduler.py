"""The scheduler's policy: which jobs get which tokens of the next step. Pure: no torch, no I/O, no clock.

Every step takes one decode token for each running sequence and fills the rest of the token budget with chunks of
prompts and update contexts of any tenants; but a tenant that runs more than its share rests for a step while another,
who does not, waits for a first token, and updates have no more than a share of the time (``pace``) while generations
run. In company a tenant with many sequences has as many a step as take ``TURN`` seconds, in turns, for whoever comes
waits for the end of the step. Within a tenant jobs begin in order of priority and arrival, and what comes after an
update waits until that update is published. As many updates are at work at once as there is memory for, and of those
that begin in one step all but the first need room for their tails. Between tenants the least served goes first, by
``counters``; a tenant whose memory is resident is preferred within a bound, so that a cold one cannot starve.

The fairness bound. While requests of two tenants are passed over, the one served more by ``prices.resident`` starts
nothing. What it has running by then may still cost it, at most, all cache rows at the dearer of prompt and output
price, one update and one swap. So it gets no further ahead of the other, in counters, which are divided by weights,
than the larger of ``resident`` and where it was, and that cost over its weight. Where not all memories find room, one
that was brought has its turn even so, and while another's is on its way nobody who is ready is kept waiting for it.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from app.errors import ServerBusy, TenantBusy
from app.worker.counters import Counters, Prices
from app.worker.jobs import Chunk, Job, Kind, Phase, Plan
from app.worker.pace import Pace

PREFETCH = 4
"""Memories a plan asks to be brought at most: those of the tenants that are next."""
TURN, COMPANY = 0.02, 10.0
"""Seconds that one tenant's decode takes a step, and for which another's last request counts as company."""


@dataclass(frozen=True)
class Limits:
    """Bounds of a step and of the queues, in tokens or requests; ``update_share`` is of time (``app.worker.pace``).

    ``updates`` are at work at once, their contexts read or their blocks written, and so many ``rebuilds``.
    """

    step_tokens: int = 512
    max_running: int = 64
    updates: int = 64
    rebuilds: int = 2
    cache_rows: int = 131_072
    queue_requests: int = 1024
    queue_requests_tenant: int = 128
    queue_tokens: int = 4_000_000
    update_share: float = 0.25


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

    def outdated(self, tenant: str) -> bool:
        """Whether it is read anew only when those who still read what is here have ended."""
        ...


class Scheduler:
    """Holds every job that waits or runs."""

    def __init__(self, limits: Limits, prices: Prices | None = None) -> None:
        self.limits = limits
        self.prices = prices or Prices()
        self.pace = Pace(limits.update_share)
        self._queues: dict[str, deque[Job]] = {}
        self._running: dict[str, dict[str, Job]] = {}
        self._updating: dict[str, Job] = {}
        self._jobs: dict[str, Job] = {}
        # every tenant that has something waiting or running, with the number of its jobs
        self._active: dict[str, int] = {}
        self._counters = Counters()
        self._deadlines: list[tuple[float, int, Job]] = []
        self._submitted = 0
        self._rows_used = 0
        self._brought: dict[str, float] = {}
        self._waiting = 0
        self._waiting_tokens = 0
        self._steps = 0
        self._rested: list[Job] = []
        self._company = float("-inf")

    # ------------------------------------------------------------ coming and going

    def submit(self, job: Job) -> None:
        """Puts a job at the end of its tenant's queue. Raises TenantBusy or ServerBusy over the bounds: how long
        to wait is for who measures it to say."""
        own = self._active.get(job.tenant, 0)
        if own >= self.limits.queue_requests_tenant:
            raise TenantBusy("this tenant has too many requests waiting")
        if len(self._jobs) >= self.limits.queue_requests:
            raise ServerBusy("too many requests are waiting")
        if self._waiting_tokens + job.waiting_tokens > self.limits.queue_tokens and self._jobs:
            raise ServerBusy("too many tokens are waiting")
        if job.tenant not in self._queues:
            self._counters.enter(job.tenant, self._queues)
        self._counters.weigh(job.tenant, job.weight)
        self._active[job.tenant] = own + 1
        self._submitted += 1
        if job.deadline is not None:
            if len(self._deadlines) > 2 * len(self._jobs) + 64:
                # most of these jobs ended long before their deadlines
                self._deadlines = [entry for entry in self._deadlines if entry[2].id in self._jobs]
                heapq.heapify(self._deadlines)
            heapq.heappush(self._deadlines, (job.deadline, self._submitted, job))
        self._queues.setdefault(job.tenant, deque()).append(job)
        self._jobs[job.id] = job
        self._waiting += 1
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
            self._waiting -= 1
            self._waiting_tokens -= job.waiting_tokens
        else:
            del self._running[job.tenant][job.id]
            self._rows_used -= job.room
            if job.kind is Kind.UPDATE:
                del self._updating[job.tenant]
        for table in (self._queues, self._running):
            if not table.get(job.tenant, True):
                del table[job.tenant]
        self._active[job.tenant] -= 1
        if not self._active[job.tenant]:
            del self._active[job.tenant]
            self._brought.pop(job.tenant, None)
            self._counters.leave(job.tenant, self._active)

    def waiting(self, tenant: str) -> bool:
        """Whether any of the tenant's jobs waits."""
        return tenant in self._queues

    @property
    def any_waiting(self) -> bool:
        return self._waiting > 0

    @property
    def empty(self) -> bool:
        return not self._jobs

    @property
    def counts(self) -> dict[str, int]:
        return {"running": len(self._jobs) - self._waiting, "waiting": self._waiting}

    def fairness_gap(self, memories: Memories) -> float:
        """How far apart the counters of tenants are whose requests wait for others', in prompt tokens."""
        return self._counters.gap(t for t in self._queues if self._waits_for_others(t, memories))

    def brought(self, tenant: str, pools: float) -> None:
        """A memory, or ``pools`` of one, has been brought to the device for the tenant.

        Charged when the request begins that it was brought for, or it would have to wait for others' once more.
        """
        if tenant in self._queues:
            self._brought[tenant] = self._brought.get(tenant, 0.0) + pools * self.prices.swap

    # ------------------------------------------------------------ the plan

    def plan(self, now: float, memories: Memories) -> Plan:
        """The next step, begun. Jobs in ``plan.start`` have been moved to running; the caller carries it out."""
        expired = list(self._expired(now))
        plan = self.begin(self.propose(now, memories))
        plan.expired = expired
        return plan

    def propose(self, now: float, memories: Memories) -> Plan:
        """The step after those that have begun, as things are: may be asked for while one of them still runs.

        What it starts is started; of the rest nothing counts until it begins.
        """
        plan = Plan()
        self._admit(plan, memories)
        budget = self.limits.step_tokens
        prefill: list[Job] = []
        crowding, turn = self._crowding(), self._turn(now)
        for tenant, jobs in self._running.items():
            decode: list[Job] = []
            for job in jobs.values():
                if job.phase is Phase.HELD:
                    continue
                if tenant in crowding and job.reads and not job.rested:
                    plan.rest.append(job)
                    continue
                (decode if job.decodes else prefill).append(job)
            if len(decode) > turn:
                decode = sorted(decode, key=lambda job: job.decoded)[:turn]
            plan.decode += decode
        budget -= len(plan.decode)
        prefill.sort(key=lambda job: (self._counters[job.tenant], job.arrival))
        reading = bool(plan.decode) or any(job.reads for job in prefill)
        contexts = self.pace.room(len(plan.decode))
        first = True
        places = self.limits.updates - sum(job.working for job in self._updating.values())
        for job in prefill:
            room, whole = budget, job.atomic
            tail = 0 if job.done else job.tail
            if not job.reads and not job.working and places <= 0:
                continue
            if reading and not job.reads:
                if not contexts:
                    continue
                # beside those who read the first context is cut to its room, if it may be; the next ones fit or wait
                room = budget if first and whole else min(budget, contexts)
                whole = whole or not first
            if not first:
                room -= tail
            # an empty step must move something, so that a budget below one context cannot stop an update
            if whole and plan.idle:
                room = max(room, job.remaining)
            count = min(job.remaining, room)
            if count <= 0 or (whole and count < job.remaining):
                continue
            plan.chunks.append(Chunk(job, job.done, count))
            budget -= count
            if not job.reads:
                budget -= tail
                contexts, first = max(0, contexts - count - tail), False
                places -= not job.working
        return plan

    def begin(self, plan: Plan) -> Plan:
        """A proposed step begins, without those who have ended meanwhile: the others are charged for it."""
        plan.decode = [job for job in plan.decode if self._jobs.get(job.id) is job]
        plan.chunks = [chunk for chunk in plan.chunks if self._jobs.get(chunk.job.id) is chunk.job]
        for job in self._rested:
            job.rested = False
        self._rested = plan.rest
        for job in plan.rest:
            job.rested = True
        self._steps += 1
        for job in plan.decode:
            job.decoded = self._steps
            self._counters.charge(job.tenant, self.prices.output)
        for chunk in plan.chunks:
            job = chunk.job
            job.done += chunk.count
            job.working = not job.reads
            self._counters.charge(
                job.tenant, chunk.count * (self.prices.prompt if job.reads else self.prices.update)
            )
        return plan

    def due(self, now: float) -> bool:
        """Whether a deadline has passed."""
        return bool(self._deadlines) and self._deadlines[0][0] <= now

    @property
    def _share(self) -> int:
        """Running requests of a tenant's if all that have any had as many."""
        return max(1, self.limits.max_running // max(1, len(self._active)))

    def _turn(self, now: float) -> int:
        """Sequences of one tenant that may decode in a step."""
        if len(self._active) > 1:
            self._company = now
        return self.pace.rows(TURN) if now - self._company <= COMPANY else self.limits.max_running

    def _crowding(self) -> set[str]:
        """Tenants whose reads rest for this step: they run more than their share while another, who does not, waits for
        a first token. Nobody rests twice in a row."""
        share = self._share
        first = any(
            job.phase is Phase.PREFILL and job.reads and job.remaining
            for jobs in self._running.values()
            if len(jobs) <= share
            for job in jobs.values()
        )
        return {tenant for tenant, jobs in self._running.items() if len(jobs) > share} if first else set()

    def _room_for(self, tenant: str, running: int) -> bool:
        """Whether another of the tenant's may run: the last eighth is for those who have less than their share."""
        most = self.limits.max_running
        return running < most - most // 8 or len(self._running.get(tenant, ())) < min(
            self._share, most - most // 4
        )

    def _expired(self, now: float) -> Iterator[Job]:
        """Takes out the jobs whose deadline has passed, earliest first."""
        while self._deadlines and self._deadlines[0][0] <= now:
            job = heapq.heappop(self._deadlines)[2]
            if job.id in self._jobs:
                self.finish(job)
                yield job

    def wanted(self, memories: Memories) -> list[tuple[str, bool]]:
        """The memories that the next plan would have brought, as ``Plan.wanted``."""
        wanted: list[tuple[str, bool]] = []
        for job, ready in self._candidates(memories):
            if len(wanted) == PREFETCH:
                break
            if not ready:
                wanted.append((job.tenant, job.reads))
        return wanted

    def _admit(self, plan: Plan, memories: Memories) -> None:
        """Starts waiting jobs, least served tenant first, and names the memories that must be brought."""
        running = len(self._jobs) - self._waiting
        blocked = stuck = float("inf")
        full = False
        for job, ready in self._candidates(memories):
            tenant = job.tenant
            full = full or running >= self.limits.max_running
            if len(plan.wanted) == PREFETCH and (full or running):
                # who comes now has been served so much more than those who wait for room that nothing of theirs starts
                break
            if not ready:
                if len(plan.wanted) < PREFETCH:
                    plan.wanted.append((tenant, job.reads))
                # room for a tenant that waits is made by starting nothing for those served much more
                blocked = min(blocked, self._counters[tenant] + self.prices.resident)
                if not memories.moving(tenant):
                    stuck = min(stuck, blocked)
                continue
            # nobody may overtake for cache rows, or a long prompt would wait for ever
            full = full or self._rows_used + job.room > self.limits.cache_rows
            # when nothing runs, only a memory that finds no slot holds others back: they leave theirs, all but those
            # who have not had their turn since they were brought
            bound = blocked if running else stuck
            if full or (self._counters[tenant] > bound and (running or not memories.owed(tenant))):
                continue
            if not self._room_for(tenant, running):
                continue
            self._start(plan, job)
            running += 1

    def _candidates(self, memories: Memories) -> Iterator[tuple[Job, bool]]:
        """The next job of each tenant that may begin one, and whether its memory is there; least served first,
        residents preferred. One that is started meanwhile is followed by its tenant's next."""
        resident = self.prices.resident
        # as if all were there: who is looked at and is not comes again at a place further back
        heads = [self._place(tenant, -resident) for tenant in self._queues]
        heapq.heapify(heads)
        while heads:
            _, _, _, tenant, looked = heapq.heappop(heads)
            job = self._head(tenant)
            if job is None:
                continue
            ready = not looked and _ready(job, memories)
            if (not ready or job.rebuilds) and self._waits_apart(job, memories):
                continue
            if not ready and not looked:
                heapq.heappush(heads, self._place(tenant, 0.0, looked=True))
                continue
            yield job, ready
            if job.phase is not Phase.WAITING and tenant in self._queues:
                heapq.heappush(heads, self._place(tenant, -resident))

    def _place(
        self, tenant: str, bonus: float, *, looked: bool = False
    ) -> tuple[float, int, float, str, bool]:
        """Among equally served tenants those come first who have fewer running, then whose request came first."""
        running = len(self._running.get(tenant, ()))
        return self._counters[tenant] + bonus, running, self._queues[tenant][0].arrival, tenant, looked

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

    def _waits_for_others(self, tenant: str, memories: Memories) -> bool:
        job = self._head(tenant)
        return job is not None and not self._waits_apart(job, memories)

    def _waits_apart(self, job: Job, memories: Memories) -> bool:
        """Whether nobody's place would help the job: it waits for its tenant's own readers, or for a rebuild's end."""
        if job.rebuilds:
            return sum(other.rebuilds for other in self._updating.values()) >= self.limits.rebuilds
        return memories.outdated(job.tenant) and not _ready(job, memories)

    def _start(self, plan: Plan, job: Job) -> None:
        queue = self._queues[job.tenant]
        queue.remove(job)
        if not queue:
            del self._queues[job.tenant]
            self._counters.begun(job.tenant)
        self._waiting -= 1
        self._waiting_tokens -= job.waiting_tokens
        self._running.setdefault(job.tenant, {})[job.id] = job
        self._rows_used += job.room
        if job.kind is Kind.UPDATE:
            self._updating[job.tenant] = job
        self._counters.charge(job.tenant, self._brought.pop(job.tenant, 0.0))
        job.phase = Phase.HELD if job.held_first else Phase.PREFILL
        plan.start.append(job)


def _ready(job: Job, memories: Memories) -> bool:
    if not job.needs_memory:
        return True
    return memories.readable(job.tenant) if job.reads else memories.resident(job.tenant)
