"""Requests that treat a memory as a thing: fork it, roll it back, rebuild it (``app.worker.rebuilds``).

A rollback takes its turn in the tenant's queue as an update does: what came before it is done before it, what
comes after it sees the memory it leaves. Generations that run go on reading the version they began with.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from app.errors import ServiceError, StoreFull, TenantElsewhere, TenantNotFound, VersionNotKept
from app.memory.residency import Residency
from app.messages import ForkTenant, GetTexts, RebuildTenant, Reply, RollbackTenant, TenantInfo
from app.store.base import Store
from app.worker.jobs import Job, Kind, Phase
from app.worker.quotas import check_bytes
from app.worker.rebuilds import Rebuilds

if TYPE_CHECKING:
    from app.worker.engine import Engine

MemoryRequest = ForkTenant | RollbackTenant | GetTexts | RebuildTenant
# a rollback that ends in these has changed nothing
_UNCHANGED = (VersionNotKept, TenantNotFound, TenantElsewhere, StoreFull)


@dataclass(eq=False)
class Turn:
    """A request that waits for its turn or has it; ``doomed`` is what it ends in when its thread comes back."""

    message: RollbackTenant
    doomed: ServiceError | None = None


class Memories:
    """Carries out memory requests in background threads; ``turns`` are those in the scheduler's queues."""

    def __init__(self, engine: Engine, residency: Residency, store: Store) -> None:
        self.engine, self.residency, self.store = engine, residency, store
        self.rebuilds = Rebuilds(engine, residency, store)
        self._turns: dict[str, Turn] = {}

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._turns or job_id in self.rebuilds

    def handle(self, message: MemoryRequest) -> None:
        """Answers with a Reply or a Failed in the engine's outbox, now or later. Raises TenantErased, TenantBusy…"""
        tenants = self.engine.tenants
        tenants.check_not_erasing(message.tenant)
        if isinstance(message, RollbackTenant):
            self._queue(message)
        elif isinstance(message, RebuildTenant):
            self.rebuilds.queue(message)
        elif isinstance(message, GetTexts):
            tenants.tell(message.id, message.tenant, lambda: self.rebuilds.texts(message))
        else:
            tenants.check_not_erasing(message.target)
            tenants.answer(message.id, message.tenant, lambda: self._fork(message), message.target)

    def _queue(self, message: RollbackTenant) -> None:
        job = Job(
            id=message.id,
            tenant=message.tenant,
            kind=Kind.UPDATE,
            length=0,
            arrival=time.monotonic(),
            held_first=True,
            needs_memory=False,
        )
        self.engine.scheduler.submit(job)
        self._turns[job.id] = Turn(message)

    # ------------------------------------------------------------ fork

    def _fork(self, message: ForkTenant) -> TenantInfo:
        """What is durable now; updates that are on their way come later. Runs in any thread."""
        self.store.claim(message.target)
        if message.most_bytes:
            check_bytes(self.store.usage(message.tenant), message.most_bytes)
        manifest = self.store.fork(
            message.tenant, message.target, version=message.version, created=time.time()
        )
        return self.engine.tenants.info(manifest, "cold")

    # ------------------------------------------------------------ rollback

    def start(self, job: Job) -> None:
        """The job's turn has come: everything of the tenant that arrived before it has begun or is done."""
        if job.id in self.rebuilds:
            self.rebuilds.start(job)
            return
        message = self._turns[job.id].message
        tenant = message.tenant

        def work() -> TenantInfo:
            manifest = self.store.claim(tenant)
            if manifest is None:
                raise TenantNotFound("there is no such tenant")
            manifest = self.store.rollback(
                tenant,
                message.version,
                expected_version=manifest.version,
                lineage=manifest.lineage,
                created=manifest.created,
            )
            return self.engine.tenants.info(manifest, "cold")

        self.engine.background(tenant, work, lambda result, error: self._rolled_back(job, result, error))

    def _rolled_back(self, job: Job, result: object, error: ServiceError | None) -> None:
        if not isinstance(error, _UNCHANGED):
            # done, or nobody can tell: the store is asked
            self.residency.renew(job.tenant)
        self._end(job, result, error)

    # ------------------------------------------------------------ ending

    def fail(self, job: Job, error: ServiceError) -> None:
        """Ends a request that waits; one that is being carried out ends when its thread comes back."""
        if job.id in self.rebuilds:
            self.rebuilds.fail(job, error)
            return
        if job.phase is Phase.WAITING:
            self._end(job, None, error)
        else:
            self._turns[job.id].doomed = error

    def _end(self, job: Job, result: object, error: ServiceError | None) -> None:
        turn = self._turns.pop(job.id)
        self.engine.finish(job)
        error = turn.doomed or error
        if error is not None:
            self.engine.fail(job.id, error)
        else:
            assert isinstance(result, TenantInfo)
            self.engine.emit(Reply(job.id, result))
