"""The worker's heart: takes requests, runs one step after another, and leaves answers in an outbox.

Knows no sockets and no processes. ``submit`` runs slow things (store, loading) in background threads and
brings their results back to the thread that calls ``step``.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from app.errors import (
    DeadlineExceeded,
    InvalidRequest,
    ServiceError,
    TenantErased,
    TooManyTokens,
    WorkerUnavailable,
)
from app.memory.arena import Arena, Memory
from app.memory.residency import Residency, Submit
from app.messages import (
    Answer,
    Cancel,
    Drain,
    EraseTenant,
    Failed,
    Finished,
    Generate,
    Request,
    Score,
    Scored,
    Stats,
    Timings,
    TokenLogprob,
    Tokens,
    Update,
    Updated,
    UpdateProgress,
)
from app.model.backbone import Backbone
from app.model.sampling import Choice, Sampler, choose
from app.store.base import BlockRecord, Store
from app.worker.jobs import Job, Kind, Phase, Plan
from app.worker.rows import Rows
from app.worker.runner import ReadChunk, Runner, UpdateChunk
from app.worker.scheduler import Limits, Scheduler
from app.worker.sequence import Sequence, begin
from app.worker.tenants import Tenants
from app.worker.updates import UpdateRun, Updates, digest


@dataclass
class _Clock:
    """When a read's stages were reached, in seconds of the monotonic clock."""

    arrival: float
    started: float = 0.0
    wanted: float = 0.0
    first_token: float = 0.0


@dataclass(eq=False)
class _Read:
    message: Generate | Score
    job: Job
    clock: _Clock
    sequence: Sequence | None = None
    sent_version: bool = field(default=False)


class Engine:
    """One device's requests. Call ``handle`` for each message and ``step`` until it returns False."""

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
    ) -> None:
        self.backbone, self.arena, self.residency, self.store = backbone, arena, residency, store
        self.max_sequence = max_sequence
        self.outbox: list[Answer] = []
        self.draining = False
        self._submit = submit
        self._rows = Rows(limits.cache_rows + 1)
        self.scheduler = Scheduler(limits)
        self.runner = Runner(backbone, arena, limits.cache_rows + 1)
        self._reads: dict[str, _Read] = {}
        self._runs: dict[str, UpdateRun] = {}
        self._pending_updates: dict[str, Update] = {}
        self._wanted_at: dict[str, float] = {}
        self._background: Counter[str] = Counter()
        self.updates = Updates(
            residency,
            self.background,
            progress=self._update_progress,
            finished=self._update_finished,
            failed=self._update_failed,
            compacted_after=compacted_after,
        )
        self.tenants = Tenants(self, residency, store)
        self._counters: Counter[str] = Counter()
        self._observations: dict[str, list[float]] = {}

    # ------------------------------------------------------------ background work

    def background(
        self, tenant: str, work: Callable[[], object], done: Callable[[object, ServiceError | None], None]
    ) -> None:
        """Runs ``work`` in a thread; while it runs the tenant cannot be erased."""
        self._background[tenant] += 1

        def finished(result: object, error: ServiceError | None) -> None:
            self._background[tenant] -= 1
            if not self._background[tenant]:
                del self._background[tenant]
            done(result, error)

        self._submit(work, finished)

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

    # ------------------------------------------------------------ requests

    def handle(self, message: Request) -> None:
        """Takes a request; what comes of it appears in the outbox now or later."""
        if isinstance(message, Cancel):
            self._cancel(message.id)
        elif isinstance(message, Drain):
            self.draining = True
        else:
            try:
                if self.draining:
                    raise WorkerUnavailable("the server is shutting down", retry_after=5.0)
                if isinstance(message, Generate | Score):
                    self._take_read(message)
                elif isinstance(message, Update):
                    self._take_update(message)
                else:
                    self.tenants.handle(message)
            except ServiceError as error:
                self.fail(message.id, error)

    def fail(self, request_id: str, error: ServiceError) -> None:
        self._counters[f"requests_failed_total:{error.code}"] += 1
        self.outbox.append(Failed(request_id, error.code, error.message, error.param, error.retry_after))

    def _check_tokens(self, tokens: list[int], param: str) -> None:
        """Raises InvalidRequest. The API has checked this already; memory is not trusted to one process."""
        if not tokens or min(tokens) < 0 or max(tokens) >= self.backbone.config.vocab_size:
            raise InvalidRequest("token ids must be in the model's vocabulary, at least one", param=param)

    def _take_read(self, message: Generate | Score) -> None:
        self.tenants.check_not_erasing(message.tenant)
        if isinstance(message, Generate):
            self._check_tokens(message.tokens, "prompt")
            if message.sampling.max_tokens < 1:
                raise InvalidRequest("max_tokens must be at least 1", param="max_tokens")
            length, total = len(message.tokens), len(message.tokens) + message.sampling.max_tokens
        else:
            self._check_tokens(message.prompt, "prompt")
            self._check_tokens(message.continuation, "continuation")
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
        )
        self.scheduler.submit(job)
        self._reads[job.id] = _Read(message, job, _Clock(now))

    def _take_update(self, message: Update) -> None:
        self.tenants.check_not_erasing(message.tenant)
        if not message.contexts:
            raise InvalidRequest("an update needs at least one context", param="text")
        config = self.backbone.config
        for context in message.contexts:
            self._check_tokens(context.tokens, "text")
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
        )
        self.scheduler.submit(job)
        self._pending_updates[job.id] = message

    def _cancel(self, request_id: str) -> None:
        read = self._reads.get(request_id)
        if read is not None:
            self._end_read(read, "cancelled")

    def fail_tenant(self, tenant: str, error: ServiceError) -> int:
        """Fails the tenant's jobs; an update whose block is being written fails when that is done."""
        jobs = self.scheduler.of(tenant)
        for job in jobs:
            if job.id in self._reads:
                self._drop_read(self._reads[job.id], error)
            elif job.id in self._pending_updates:
                del self._pending_updates[job.id]
                self.scheduler.finish(job)
                self.fail(job.id, error)
            else:
                run = self._runs[job.id]
                if job.phase is Phase.HELD:
                    run.doomed = error
                else:
                    self._update_failed(run, error)
        return len(jobs)

    # ------------------------------------------------------------ one step

    def step(self) -> bool:
        """Plans and runs one step. False if nothing can move before something comes from outside."""
        self.updates.publish()
        self.tenants.step()
        self._fail_unloadable()
        plan = self.scheduler.plan(time.monotonic(), self.residency)
        for job in plan.expired:
            self._expire(job)
        now = time.monotonic()
        # those that start pin their memories first, before others' loading looks for one to evict
        for job in plan.start:
            self._start(job, now)
        for tenant, read in plan.wanted:
            self._wanted_at.setdefault(tenant, now)
            self.residency.prepare(tenant, read=read)
        if not plan.idle:
            self._run(plan)
        # what has just started, an update's first context above all, has its tokens in the next plan
        return bool(plan.start) or not plan.idle

    def _fail_unloadable(self) -> None:
        while self.residency.failures:
            tenant, error = self.residency.failures.popitem()
            self.fail_tenant(tenant, error)

    def _expire(self, job: Job) -> None:
        read = self._reads.get(job.id)
        if read is not None:
            self._drop_read(read, DeadlineExceeded("the request's deadline has passed"))

    def _start(self, job: Job, now: float) -> None:
        memory = self.residency.get(job.tenant)
        assert memory is not None
        wanted = self._wanted_at.pop(job.tenant, now)
        if job.kind is Kind.UPDATE:
            self._start_update(job, memory, now, now - wanted)
        else:
            self._start_read(self._reads[job.id], memory, now, wanted)
        self._observe("request_queue_time_seconds", now - job.arrival)

    def _start_update(self, job: Job, memory: Memory, now: float, loading: float) -> None:
        memory.pins += 1
        message = self._pending_updates.pop(job.id)
        run = UpdateRun(job, message, memory, digest(message), started=now, loaded=loading)
        self._runs[job.id] = run
        self.updates.begin(run)

    def _start_read(self, read: _Read, memory: Memory, now: float, wanted: float) -> None:
        read.clock.started, read.clock.wanted = now, max(wanted, read.clock.arrival)
        view = self.arena.read(memory)
        message = read.message
        pages, rows = self._rows.take(read.job.room)
        tokens = (
            list(message.tokens) if isinstance(message, Generate) else message.prompt + message.continuation
        )
        sequence = begin(
            read.job.id,
            memory,
            view,
            tokens,
            pages,
            rows,
            has_bos=self.backbone.config.add_bos_embedding,
            prompt_position=self.backbone.config.prompt_position,
        )
        if isinstance(message, Generate):
            s = message.sampling
            sequence.sampler = Sampler(
                s.temperature, s.top_p, s.top_k, s.min_p, s.repetition_penalty, s.seed, s.logprobs
            )
            if s.repetition_penalty != 1:
                seen = torch.zeros(self.backbone.config.vocab_size, dtype=torch.bool)
                seen[tokens] = True
                sequence.sampler.seen = seen.to(self.backbone.device)
            sequence.max_tokens, sequence.stop_tokens = s.max_tokens, frozenset(s.stop_tokens)
        else:
            sequence.scored = len(message.continuation)
        read.sequence = sequence

    def _run(self, plan: Plan) -> None:
        decode = [s for job in plan.decode if (s := self._reads[job.id].sequence) is not None]
        reads, updates, runs = [], [], []
        for chunk in plan.chunks:
            if chunk.job.reads:
                sequence = self._reads[chunk.job.id].sequence
                assert sequence is not None
                reads.append(ReadChunk(sequence, chunk.start, chunk.count))
                self._counters["prompt_tokens_total"] += chunk.count
            else:
                run = self._runs[chunk.job.id]
                assert run.current is not None
                tokens = run.context.tokens[chunk.start : chunk.start + chunk.count]
                updates.append(UpdateChunk(run.current, chunk.start, tokens))
                runs.append(run)
                self._counters["update_tokens_total"] += chunk.count
        sequences, logits = self.runner.step(decode, reads, updates)
        self._counters["steps_total"] += 1
        if sequences:
            samplers = [s.sampler for s in sequences if s.sampler is not None]
            for sequence, choice in zip(sequences, choose(logits, samplers), strict=True):
                self._accept(self._reads[sequence.id], sequence, choice)
        for read_chunk in reads:
            if read_chunk.sequence.scored:
                self._finish_score(self._reads[read_chunk.sequence.id], read_chunk.sequence)
        for run in runs:
            if run.current is not None and run.current.finished:
                self.updates.computed(run)

    # ------------------------------------------------------------ reads

    def _accept(self, read: _Read, sequence: Sequence, choice: Choice) -> None:
        if read.job.phase is Phase.PREFILL:
            read.job.phase = Phase.DECODE
            read.clock.first_token = time.monotonic()
            self._observe("time_to_first_token_seconds", read.clock.first_token - read.clock.arrival)
        if choice.token in sequence.stop_tokens:
            self._end_read(read, "stop", stop_token=choice.token)
            return
        sequence.tokens.append(choice.token)
        self._counters["generation_tokens_total"] += 1
        logprobs = None
        if choice.logprob is not None:
            logprobs = [TokenLogprob(choice.logprob, list(choice.top))]
        version = None if read.sent_version else sequence.view.version
        read.sent_version = True
        self.outbox.append(Tokens(sequence.id, [choice.token], logprobs, version))
        if sequence.produced == sequence.max_tokens:
            self._end_read(read, "length")

    def _finish_score(self, read: _Read, sequence: Sequence) -> None:
        if sequence.computed < len(sequence.tokens) - 1:
            return
        self.outbox.append(Scored(sequence.id, sequence.logprobs, sequence.greedy, sequence.view.version))
        self._release(read)

    def _end_read(self, read: _Read, reason: str, *, stop_token: int | None = None) -> None:
        now, clock, sequence = time.monotonic(), read.clock, read.sequence
        memory_version = 0 if sequence is None else sequence.view.version
        if isinstance(read.message, Generate):
            self.outbox.append(
                Finished(
                    read.job.id,
                    reason,
                    memory_version,
                    len(read.message.tokens),
                    0 if sequence is None else sequence.produced,
                    Timings(
                        queue=(clock.started or now) - clock.arrival,
                        load=max(0.0, clock.started - clock.wanted) if clock.started else 0.0,
                        first_token=max(0.0, clock.first_token - clock.arrival),
                        total=now - clock.arrival,
                    ),
                    stop_token,
                )
            )
            self._counters[f"requests_finished_total:{reason}"] += 1
            self._observe("e2e_request_latency_seconds", now - clock.arrival)
        self._release(read)

    def _drop_read(self, read: _Read, error: ServiceError) -> None:
        self._release(read)
        self.fail(read.job.id, error)

    def _release(self, read: _Read) -> None:
        self.scheduler.finish(read.job)
        del self._reads[read.job.id]
        if read.sequence is not None:
            self._rows.give(read.sequence.pages)
            self.arena.release(read.sequence.memory, read.sequence.view)

    # ------------------------------------------------------------ updates

    def _update_progress(self, run: UpdateRun) -> None:
        self._counters["update_blocks_total"] += 1
        self._counters["forgotten_tokens_total"] += self.backbone.config.num_tokens
        self.outbox.append(UpdateProgress(run.job.id, run.index, len(run.contexts), run.memory.version))

    def _update_finished(self, run: UpdateRun, replayed: list[BlockRecord] | None) -> None:
        """``replayed`` are the records of the same update done before, under its idempotency key."""
        now = time.monotonic()
        versions = [r.version for r in replayed] if replayed else run.versions
        shares = [self.backbone.config.surviving_share(versions[-1] - v) for v in versions]
        self.outbox.append(
            Updated(
                run.job.id,
                memory_version=versions[-1],
                blocks=len(run.contexts),
                tokens=sum(r.tokens for r in replayed) if replayed else run.tokens,
                surviving_share=sum(shares) / len(shares),
                timings=Timings(
                    queue=run.started - run.job.arrival, load=run.loaded, total=now - run.job.arrival
                ),
                replayed=replayed is not None,
            )
        )
        self._observe("update_latency_seconds", now - run.job.arrival)
        self._end_update(run)

    def _update_failed(self, run: UpdateRun, error: ServiceError) -> None:
        self._end_update(run)
        self.fail(run.job.id, error)

    def _end_update(self, run: UpdateRun) -> None:
        run.memory.pins -= 1
        del self._runs[run.job.id]
        self.scheduler.finish(run.job)

    # ------------------------------------------------------------ numbers

    def _observe(self, name: str, value: float) -> None:
        self._observations.setdefault(name, []).append(value)

    def stats(self) -> Stats:
        """The heartbeat's numbers; observations are handed over once."""
        counts, residency = self.scheduler.counts, self.residency
        observations, self._observations = self._observations, {}
        loads = {f"memory_loads_total:{tier}": float(n) for tier, n in residency.loads.items()}
        return Stats(
            time=time.time(),
            gauges={
                "num_requests_running": counts["running"],
                "num_requests_waiting": counts["waiting"],
                **{f"memories:{tier}": float(count) for tier, count in residency.counts.items()},
            },
            counters={
                **{name: float(count) for name, count in self._counters.items()},
                **loads,
                "memory_evictions_total": float(residency.evictions),
                "store_commits_total": float(self.updates.commits),
                "store_committed_bytes_total": float(self.updates.committed_bytes),
                "store_compactions_total": float(self.updates.compactions),
            },
            observations=observations,
        )

    def erase(self, message: EraseTenant) -> None:
        """Fails the tenant's open requests; ``Tenants`` erases it when all is quiet."""
        self.tenants.erasing(message, self.fail_tenant(message.tenant, TenantErased("the tenant was erased")))
