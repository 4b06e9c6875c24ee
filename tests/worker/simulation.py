"""A scheduler at work in virtual time: jobs, slots for memories, loads that take their time, and what must hold."""

from __future__ import annotations

from dataclasses import dataclass, field

from app.worker.counters import Prices
from app.worker.jobs import Job, Kind, Phase, Plan
from app.worker.scheduler import PREFETCH, Limits, Scheduler


@dataclass(eq=False)
class Request:
    """A job and what it still does once its prompt is through: tokens to decode, or steps to be committed."""

    job: Job
    after: int


@dataclass
class Slots:
    """``slots`` memories are resident, at most; a load takes ``load`` steps. Loads come in the order asked for."""

    slots: int
    load: int
    here: dict[str, bool] = field(default_factory=dict)
    coming: dict[str, int] = field(default_factory=dict)
    loads: int = 0

    def readable(self, tenant: str) -> bool:
        return tenant in self.here

    def resident(self, tenant: str) -> bool:
        return tenant in self.here

    def moving(self, tenant: str) -> bool:
        return tenant in self.coming

    def owed(self, tenant: str) -> bool:
        return self.here.get(tenant, False)

    def outdated(self, tenant: str) -> bool:
        return False


class Simulation:
    """Asserts at every step what must hold of every plan."""

    def __init__(
        self,
        limits: Limits,
        *,
        slots: int = 1000,
        load: int = 0,
        prices: Prices | None = None,
        holds: int = 0,
    ) -> None:
        self.limits, self.holds = limits, holds
        self.scheduler = Scheduler(limits, prices)
        self.memories = Slots(slots, load)
        self.now = 0
        self.open: dict[str, Request] = {}
        self.arrived: dict[str, list[Job]] = {}
        self.started: dict[str, list[Job]] = {}
        self.ended: dict[str, int] = {}
        self.service: dict[str, float] = {}
        self.trace: list[object] = []
        self.backlogged: set[str] = set()
        self.weights: dict[str, float] = {}
        # for memories that were brought: what a tenant is charged when its next request begins
        self.owing: dict[str, float] = {}
        self.resting: set[str] = set()
        self._names = 0

    def submit(
        self,
        tenant: str,
        *,
        update: bool = False,
        prompt: int = 8,
        output: int = 4,
        weight: float = 1.0,
        priority: int = 0,
        deadline: float | None = None,
        atomic: bool = False,
    ) -> Job:
        self._names += 1
        kind = Kind.UPDATE if update else Kind.GENERATE
        room = 0 if update else prompt + output
        job = Job(
            f"{self._names}", tenant, kind, prompt, float(self.now), room, prompt,
            deadline=deadline, priority=priority, weight=weight, atomic=atomic and update,
        )  # fmt: skip
        self.scheduler.submit(job)
        self.weights[tenant] = weight
        self.open[job.id] = Request(job, self.holds if update else output)
        self.arrived.setdefault(tenant, []).append(job)
        return job

    def cancel(self, job: Job) -> None:
        self.scheduler.finish(job)
        self.open.pop(job.id, None)
        if not self.scheduler.of(job.tenant):
            self.owing.pop(job.tenant, None)

    # ------------------------------------------------------------ a step

    def step(self) -> Plan:
        self._land()
        served = {
            tenant: self.scheduler._counters[tenant] for tenant in self.arrived if self.scheduler.of(tenant)
        }
        plan = self.scheduler.plan(self.now, self.memories)
        self._check(plan)
        self._check_charges(plan, served)
        self.backlogged = self.passed_over()
        for job in plan.expired:
            del self.open[job.id]
        for job in plan.start:
            self.memories.here[job.tenant] = False
            self.started.setdefault(job.tenant, []).append(job)
        for tenant, _ in plan.wanted:
            self._bring(tenant)
        self._carry_out(plan)
        self.trace.append(
            [
                [job.id for job in plan.start],
                [job.id for job in plan.decode],
                [(chunk.job.id, chunk.start, chunk.count) for chunk in plan.chunks],
                plan.wanted,
            ]
        )
        self.now += 1
        return plan

    def run(self, most: int) -> None:
        for _ in range(most):
            if self.scheduler.empty:
                return
            self.step()
        raise AssertionError(f"{len(self.open)} jobs are starved after {most} steps")

    def _land(self) -> None:
        for tenant, ready in list(self.memories.coming.items()):
            if ready <= self.now:
                del self.memories.coming[tenant]
                self.memories.here[tenant] = True
                self.scheduler.brought(tenant, 1.0)
                if self.scheduler.waiting(tenant):
                    self.owing[tenant] = self.owing.get(tenant, 0.0) + self.scheduler.prices.swap

    def _bring(self, tenant: str) -> None:
        memories = self.memories
        if tenant in memories.here or tenant in memories.coming:
            return
        if len(memories.here) + len(memories.coming) >= memories.slots:
            kept = {t for t, owed in memories.here.items() if owed and self.scheduler.waiting(t)}
            busy = {
                t for t in memories.here if any(j.phase is not Phase.WAITING for j in self.scheduler.of(t))
            }
            free = [t for t in memories.here if t not in kept | busy]
            if not free:
                return
            del memories.here[free[0]]
        memories.loads += 1
        memories.coming[tenant] = self.now + memories.load

    def _carry_out(self, plan: Plan) -> None:
        for chunk in plan.chunks:
            if chunk.job.remaining == 0:
                chunk.job.phase = Phase.DECODE if chunk.job.kind is Kind.GENERATE else Phase.HELD
        decoded = {job.id for job in plan.decode}
        for id, request in list(self.open.items()):
            if id not in decoded and request.job.phase is not Phase.HELD:
                continue
            request.after -= 1
            if request.after <= 0:
                self.ended[id] = self.now
                self.cancel(request.job)

    # ------------------------------------------------------------ what must hold of every plan

    def _check(self, plan: Plan) -> None:
        limits, scheduler = self.limits, self.scheduler
        tokens = len(plan.decode) + sum(chunk.count for chunk in plan.chunks)
        # but for a context that cannot be cut, by itself
        alone = not plan.decode and len(plan.chunks) == 1 and plan.chunks[0].job.atomic
        assert alone or tokens <= limits.step_tokens, "the token budget is overrun"
        assert all(chunk.count == chunk.job.length for chunk in plan.chunks if chunk.job.atomic)
        assert len(plan.wanted) <= PREFETCH, "too many memories are sent for"
        assert scheduler.counts["running"] <= limits.max_running
        running = [r.job for r in self.open.values() if r.job.phase is not Phase.WAITING]
        assert sum(job.room for job in running) <= limits.cache_rows, "there are not so many cache rows"
        # a running job that can decode does, and rests for another's first token once at most before it does
        decoding = {job.id for job in running if job.phase is Phase.DECODE}
        resting = decoding - {job.id for job in plan.decode}
        assert {job.id for job in plan.decode} <= decoding
        assert not resting & self.resting, "a job rests twice in a row"
        assert not resting or plan.chunks, "jobs rest for nothing"
        self.resting = resting
        for number, job in enumerate(plan.start):
            assert self.memories.resident(job.tenant), "a job begins without its memory"
            self._check_order(job, plan.start[number + 1 :])
        assert len(self.memories.here) + len(self.memories.coming) <= self.memories.slots

    def _check_order(self, job: Job, later: list[Job]) -> None:
        """Nothing passes an update, and an update passes nothing; between updates the more urgent reads go first.
        ``later`` begin in the same plan, behind it."""
        begun = self.started.get(job.tenant, [])
        arrived = self.arrived[job.tenant]
        place = arrived.index(job)
        waiting = {j.id for j in arrived if j.phase is Phase.WAITING or j in later} & self.open.keys()
        for other in arrived[:place]:
            if Kind.UPDATE in (job.kind, other.kind) or other.priority >= job.priority:
                assert other.id not in waiting, "a job has passed another of its tenant"
            if other.kind is Kind.UPDATE and other in begun:
                assert other.id not in self.open, "a job begins behind an update that is not done"
        for other in arrived[place + 1 :] if job.kind is not Kind.UPDATE else ():
            if other.kind is Kind.UPDATE:
                break
            assert other.id not in waiting or other.priority <= job.priority, "a less urgent job goes first"

    # ------------------------------------------------------------ fairness

    def _check_charges(self, plan: Plan, served: dict[str, float]) -> None:
        """Every token of the plan is charged to its tenant, and every memory to the request that it was brought for."""
        prices = self.scheduler.prices
        cost: dict[str, float] = {}
        for job in plan.decode:
            cost[job.tenant] = cost.get(job.tenant, 0.0) + prices.output
        for chunk in plan.chunks:
            price = prices.prompt if chunk.job.reads else prices.update
            cost[chunk.job.tenant] = cost.get(chunk.job.tenant, 0.0) + chunk.count * price
        for job in plan.start:
            cost[job.tenant] = cost.get(job.tenant, 0.0) + self.owing.pop(job.tenant, 0.0)
        for tenant, before in served.items():
            if self.scheduler.of(tenant):
                charged = (self.scheduler._counters[tenant] - before) * self.weights[tenant]
                assert abs(charged - cost.get(tenant, 0.0)) < 1e-6, "a plan is not what it was charged as"

    def cost(self, update: int) -> float:
        """What a tenant's running requests may still be charged, at most, with updates of ``update`` tokens."""
        prices = self.scheduler.prices
        return (
            self.limits.cache_rows * max(prices.prompt, prices.output) + update * prices.update + prices.swap
        )

    def passed_over(self) -> set[str]:
        """Tenants with a request that could have begun in this plan and did not."""
        scheduler = self.scheduler
        return {t for t in self.arrived if scheduler.waiting(t) and t not in scheduler._updating}
