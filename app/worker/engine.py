"""The worker's heart: takes requests, runs one step after another, and leaves answers in an outbox.

Knows no sockets and no processes. ``submit`` runs slow things (store, loading) in background threads and
brings their results back to the thread that calls ``step``.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import takewhile

import structlog

from app import logs
from app.errors import (
    SHUT_DOWN,
    DeadlineExceeded,
    InvalidRequest,
    ServiceError,
    TenantErased,
    TooManyTokens,
    WorkerUnavailable,
)
from app.memory.arena import Arena
from app.memory.residency import Residency, Submit
from app.messages import (
    Answer,
    Cancel,
    Drain,
    EraseTenant,
    Failed,
    Generate,
    Question,
    Request,
    Score,
    Stats,
    Update,
)
from app.model.backbone import Backbone
from app.store.base import Store
from app.worker.graphs import Capture
from app.worker.jobs import Job, Kind, Plan
from app.worker.looks import Looks
from app.worker.memories import Memories, MemoryRequest
from app.worker.numbers import Numbers
from app.worker.reads import Reads
from app.worker.rows import Rows
from app.worker.runner import Runner
from app.worker.scheduler import Limits, Scheduler
from app.worker.steps import Issued, Run, Steps
from app.worker.strays import Strays
from app.worker.tenants import Tenants
from app.worker.transfers import TransferRequest, Transfers
from app.worker.updates import UpdateRun
from app.worker.writes import Writes

log = structlog.get_logger("worker")


def _by(name: str, numbers: dict[str, int]) -> dict[str, float]:
    return {f"{name}:{label}": float(number) for label, number in numbers.items()}


class Engine:
    """One device's requests. Call ``handle`` for each message and ``step`` until it returns False.

    ``plans_ahead``: the device works by itself, and the next step is planned meanwhile.
    """

    def __init__(
        self,
        backbone: Backbone,
        arena: Arena,
        residency: Residency,
        store: Store,
        limits: Limits,
        submit: Submit,
        *,
        max_sequence: int,
        compacted_after: int,
        capture: Capture | None = None,
        plans_ahead: bool = False,
    ) -> None:
        self.backbone, self.arena, self.residency, self.store = backbone, arena, residency, store
        self.max_sequence = max_sequence
        self.outbox: list[Answer] = []
        self.draining = self.ended = False
        self._submit = submit
        self._rows = Rows(limits.cache_rows + 1)
        self.scheduler = Scheduler(limits)
        residency.waiting, residency.settled = self.scheduler.waiting, self._settled
        pool_bytes = Arena.bytes_per_pool(backbone)
        residency.brought = lambda tenant, moved: self.scheduler.brought(tenant, moved / pool_bytes)
        self.runner = Runner(backbone, arena, limits.cache_rows + 1, limits.max_running, capture)
        self._plans_ahead = plans_ahead
        self._ahead: Plan | None = None
        # whether anything has come since that plan was made that it knows nothing of
        self._news = False
        self.numbers = Numbers()
        self.reads = Reads(
            backbone,
            arena,
            self._rows,
            self.numbers,
            finish=self.finish,
            emit=self.emit,
        )
        self._wanted_at: dict[str, float] = {}
        self._background: Counter[str] = Counter()
        self._looks = Looks(submit)
        self.writes = Writes(
            residency,
            self.background,
            self.numbers,
            finish=self.finish,
            emit=self.emit,
            fail=self.fail,
            news=self._anew,
            compacted_after=compacted_after,
        )
        self.updates = self.writes.updates
        self.steps = Steps(
            self.runner, self.reads, self.numbers, run_of=self._run_of, computed=self._computed
        )
        self.tenants = Tenants(self, residency, store)
        self.strays = Strays(self, residency, store)
        self.memories = Memories(self, residency, store)
        self.transfers = Transfers(self, residency, store)

    # ------------------------------------------------------------ background work

    def background(
        self,
        tenant: str,
        work: Callable[[], object],
        done: Callable[[object, ServiceError | None], None],
        *others: str,
    ) -> None:
        """Runs ``work`` in a thread; while it runs neither the tenant nor ``others`` can be erased."""
        self._submit(work, self._held(done, tenant, *others))

    def look(
        self,
        tenant: str,
        work: Callable[[], object],
        done: Callable[[object, ServiceError | None], None],
    ) -> None:
        """As ``background``, for what changes nothing: it waits for other tenants' looks, and they for it."""
        self._looks.submit(tenant, work, self._held(done, tenant))

    def _held(
        self, done: Callable[[object, ServiceError | None], None], *held: str
    ) -> Callable[[object, ServiceError | None], None]:
        self._background.update(held)

        def finished(result: object, error: ServiceError | None) -> None:
            for name in held:
                self._background[name] -= 1
                if not self._background[name]:
                    del self._background[name]
            self._news = True
            done(result, error)
            for name in held:
                self._release(name)

        return finished

    def finish(self, job: Job) -> None:
        """Takes a job out that has ended, however it did."""
        self.scheduler.finish(job)
        # whoever waits may have its place
        self._news = self._news or self.scheduler.any_waiting
        self._release(job.tenant)

    def _settled(self, tenant: str) -> None:
        """A memory has been brought, or could not be."""
        self._news = True
        self._release(tenant)

    def _anew(self) -> None:
        self._news = True

    def _release(self, tenant: str) -> None:
        """With its last request gone, another server on the same store may have the tenant."""
        if not self.scheduler.of(tenant):
            self._wanted_at.pop(tenant, None)
            if not self._background[tenant]:
                self.store.release(tenant)

    def quiet(self, tenant: str) -> bool:
        """Whether nothing of this tenant runs or is in the hands of a background thread."""
        memory = self.residency.get(tenant)
        return (
            not self.scheduler.of(tenant)
            and not self._background[tenant]
            and not self.residency.moving(tenant)
            and (memory is None or memory.pins == 0)
        )

    @property
    def idle(self) -> bool:
        """Whether nothing waits, runs, or is being written."""
        return self.scheduler.empty and not self._background

    def end(self) -> None:
        """The time to drain is over: fails what is left. A block that is being written is written, and told of."""
        self.ended = True
        self._fail_jobs(self.scheduler.all(), WorkerUnavailable(SHUT_DOWN))

    # ------------------------------------------------------------ requests

    def handle(self, message: Request) -> None:
        """Takes a request; what comes of it appears in the outbox now or later."""
        if isinstance(message, Cancel):
            self.reads.cancel(message.id, message.reason)
        elif isinstance(message, Drain):
            self.draining = True
        else:
            self._news = True
            with logs.about(message.id):
                self._take(message)

    def _take(self, message: Question) -> None:
        try:
            if self.draining:
                raise WorkerUnavailable("the server is shutting down")
            if isinstance(message, Generate | Score):
                self._take_read(message)
            elif isinstance(message, Update):
                self._take_update(message)
            elif isinstance(message, MemoryRequest):
                self.memories.handle(message)
            elif isinstance(message, TransferRequest):
                self.transfers.handle(message)
            else:
                self.tenants.handle(message)
        except ServiceError as error:
            self.fail(message.id, error)

    def emit(self, answer: Answer) -> None:
        self.outbox.append(answer)

    def fail(self, request_id: str, error: ServiceError) -> None:
        if error.serious:
            log.warning("request failed", job=request_id, **logs.of_error(error))
        self.numbers.count(f"requests_failed_total:{error.code}")
        self.emit(Failed(request_id, error.code, error.message, error.param, error.retry_after))

    def check_tokens(self, tokens: list[int], param: str) -> None:
        """Raises InvalidRequest. The API has checked this already; memory is not trusted to one process."""
        if not tokens or min(tokens) < 0 or max(tokens) >= self.backbone.config.vocab_size:
            raise InvalidRequest("token ids must be in the model's vocabulary, at least one", param=param)

    def _take_read(self, message: Generate | Score) -> None:
        self.tenants.check_not_erasing(message.tenant)
        if isinstance(message, Generate):
            self.check_tokens(message.tokens, "prompt")
            if message.sampling.max_tokens < 1:
                raise InvalidRequest("max_tokens must be at least 1", param="max_tokens")
            length, total = len(message.tokens), len(message.tokens) + message.sampling.max_tokens
        else:
            self.check_tokens(message.prompt, "prompt")
            self.check_tokens(message.continuation, "continuation")
            total = len(message.prompt) + len(message.continuation)
            length = total - 1
        if total > min(self.max_sequence, self._rows.capacity):
            raise TooManyTokens(
                f"{total} tokens of prompt and completion are more than the {self.max_sequence} allowed",
                param="prompt",
            )
        now = time.monotonic()
        job = Job(
            id=message.id,
            tenant=message.tenant,
            kind=Kind.GENERATE if isinstance(message, Generate) else Kind.SCORE,
            length=length,
            arrival=now,
            room=Rows.rounded(total),
            waiting_tokens=length,
            deadline=None if message.deadline is None else now + message.deadline - time.time(),
            priority=message.priority if isinstance(message, Generate) else 0,
            weight=message.weight,
        )
        self.scheduler.submit(job)
        self.reads.add(message, job)
        self._entered(job)

    def _take_update(self, message: Update) -> None:
        self.tenants.check_not_erasing(message.tenant)
        if not message.contexts:
            raise InvalidRequest("an update needs at least one context", param="text")
        config = self.backbone.config
        for context in message.contexts:
            self.check_tokens(context.tokens, "text")
            if len(context.tokens) > config.max_context:
                raise TooManyTokens(f"a context takes at most {config.max_context} tokens", param="text")
        job = Job(
            id=message.id,
            tenant=message.tenant,
            kind=Kind.UPDATE,
            length=len(message.contexts[0].tokens),
            arrival=time.monotonic(),
            waiting_tokens=sum(len(c.tokens) for c in message.contexts),
            # what is to be computed is known once the memory is at hand
            held_first=True,
            weight=message.weight,
        )
        self.scheduler.submit(job)
        self.writes.add(message, job)
        self._entered(job)

    def _entered(self, job: Job) -> None:
        """Brings the memories that are next already before the next plan is made."""
        residency = self.residency
        residency.traffic.hits[residency.tier(job.tenant)] += 1
        if not residency.busy and not residency.readable(job.tenant):
            self._bring(self.scheduler.wanted(residency), time.monotonic(), ahead=True)

    def _bring(self, wanted: list[tuple[str, bool]], now: float, *, ahead: bool = False) -> None:
        for tenant, read in wanted:
            self._wanted_at.setdefault(tenant, now)
            self.residency.prepare(tenant, read=read, ahead=ahead)

    def fail_tenant(self, tenant: str, error: ServiceError) -> int:
        """Fails the tenant's jobs; an update whose block is being written fails when that is done."""
        return self.transfers.stop(tenant, error) + self._fail_jobs(self.scheduler.of(tenant), error)

    def _fail_jobs(self, jobs: list[Job], error: ServiceError) -> int:
        for job in jobs:
            if job.id in self.memories:
                self.memories.fail(job, error)
            elif job.id in self.reads:
                self.reads.release(job.id)
                self.fail(job.id, error)
            else:
                self.writes.fail(job, error)
        return len(jobs)

    # ------------------------------------------------------------ one step

    def step(self) -> bool:
        """Runs one step. False if nothing can move before something comes from outside."""
        self.updates.publish()
        self.tenants.step()
        self.strays.step(time.monotonic())
        self._fail_unloadable()
        sent = self.residency.sent
        plan = self._foreseen() or self._plan()
        if not plan.idle:
            issued = self.steps.issue(plan)
            if self._plans_ahead:
                self._plan_ahead(issued)
            spent = self.steps.settle(issued)
            spent = replace(spent, beside=self.updates.take_seconds())
            self.scheduler.pace.spent(spent, reading=issued.reading)
        # what has just started, an update's first context above all, has its tokens in the next plan; and what
        # waited for another's slot may go on beside its loading
        return bool(plan.start) or not plan.idle or self.residency.sent > sent

    def _plan(self) -> Plan:
        plan = self.scheduler.plan(time.monotonic(), self.residency)
        for job in plan.expired:
            self.reads.release(job.id)
            self.fail(job.id, DeadlineExceeded("the request's deadline has passed"))
        self._open(plan)
        return plan

    def _plan_ahead(self, issued: Issued) -> None:
        """Plans the next step while the device is at this one, whose sequences are taken to go on."""
        if issued.reading:
            self.scheduler.pace.begun(issued.rows, sum(chunk.rows for chunk in issued.updates))
        self._news = False
        self._ahead = self.scheduler.propose(time.monotonic(), self.residency)
        self._open(self._ahead)

    def _foreseen(self) -> Plan | None:
        """The plan that was made ahead, without those who have ended since. None if anything else has come between: it
        is made anew, and nobody waits a step longer for it."""
        ahead, self._ahead = self._ahead, None
        if ahead is None or self._news or self.scheduler.due(time.monotonic()):
            return None
        plan = self.scheduler.begin(ahead)
        return None if plan.idle else plan

    def _open(self, plan: Plan) -> None:
        """Begins what the plan starts, and has the memories brought that it wants."""
        now = time.monotonic()
        # those that start pin their memories first, before others' loading looks for one to evict
        for job in plan.start:
            with logs.about(job.id):
                self._start(job, now)
        self._bring(plan.wanted, now)

    def _fail_unloadable(self) -> None:
        while self.residency.failures:
            tenant, error = self.residency.failures.popitem()
            # a rollback or a rebuild may be what makes the memory loadable again, for those behind it too
            jobs = takewhile(lambda job: job.needs_memory, self.scheduler.of(tenant))
            self._fail_jobs(list(jobs), error)

    def _start(self, job: Job, now: float) -> None:
        if job.id in self.memories:
            self.memories.start(job)
            return
        memory = self.residency.get(job.tenant)
        assert memory is not None
        self.residency.begun(memory)
        wanted = self._wanted_at.pop(job.tenant, now)
        if job.kind is Kind.UPDATE:
            self.writes.start(job, memory, now, now - wanted)
        else:
            self.reads.start(job, memory, now, wanted)
        self.numbers.observe("request_queue_time_seconds", now - job.arrival)

    def _run_of(self, job: Job) -> Run:
        return self.writes.run(job.id) or self.memories.rebuilds.run(job.id)

    def _computed(self, run: Run) -> None:
        if isinstance(run, UpdateRun):
            self.updates.computed(run)
        else:
            self.memories.rebuilds.computed(run)

    # ------------------------------------------------------------ numbers

    def stats(self) -> Stats:
        """The heartbeat's numbers; observations are handed over once."""
        counts, residency = self.scheduler.counts, self.residency
        observations = self.numbers.take_observations()
        for tier, seconds in residency.traffic.take_seconds().items():
            observations[f"memory_load_seconds:{tier}"] = seconds
        return Stats(
            time=time.time(),
            gauges={
                "num_requests_running": counts["running"],
                "num_requests_waiting": counts["waiting"],
                "fairness_gap_tokens": self.scheduler.fairness_gap(residency),
                **_by("memories", residency.counts),
                **_by("memory_bytes", residency.bytes),
            },
            counters={
                **{name: float(count) for name, count in self.numbers.counters.items()},
                **residency.traffic.counters,
                "memory_evictions_total:warm": float(residency.warm.evictions),
                "store_commits_total": float(self.updates.commits),
                "store_committed_bytes_total": float(self.updates.committed_bytes),
                "store_compactions_total": float(self.updates.compactions),
                **_by("store_compactions_failed_total", self.updates.failed_compactions),
            },
            observations=observations,
        )

    def erase(self, message: EraseTenant) -> None:
        """Fails the tenant's open requests; ``Tenants`` erases it when all is quiet."""
        self.tenants.erasing(message, self.fail_tenant(message.tenant, TenantErased("the tenant was erased")))
