"""Rebuilding a memory: the kept texts of its updates told anew to the model that is served now.

A rebuild takes its turn in the tenant's queue as an update does, and its contexts go through the same steps as
other tenants' work. Nothing of it is in the store before all of it is: the old memory is swapped for the new one
at the very end, so that a rebuild that is cut short has changed nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from app.errors import (
    ContextTooShort,
    InvalidRequest,
    ServiceError,
    StoreFailed,
    TextsNotKept,
    VersionConflict,
)
from app.memory.codec import Block, Pool, encode_snapshot
from app.memory.replay import replay
from app.memory.residency import Residency
from app.messages import (
    Context,
    GetTexts,
    KeptText,
    RebuildTenant,
    Reply,
    TenantInfo,
    Texts,
    Update,
    UpdateProgress,
)
from app.model.batch import SelfUpdate
from app.model.forgetting import covered, draw
from app.store.base import BlobRef, BlockRecord, Idempotency, Manifest, Store
from app.worker.jobs import Job, Kind, Phase
from app.worker.quotas import check_bytes
from app.worker.updates import digest

if TYPE_CHECKING:
    from app.worker.engine import Engine

_NO_BLOB = BlobRef("", 0, "")


@dataclass(eq=False)
class RebuildRun:
    """``version`` and ``tail`` are the new memory's so far; ``pool`` holds its blocks but for ``fresh`` ones."""

    job: Job
    message: RebuildTenant
    index: int = 0
    current: SelfUpdate | None = None
    doomed: ServiceError | None = None
    old: Manifest | None = None
    records: list[BlockRecord] = field(default_factory=list)
    version: int = 0
    tail: Tensor | None = None
    pool: Pool | None = None
    fresh: list[tuple[int, Block]] = field(default_factory=list)

    @property
    def context(self) -> Context:
        told = self.message.contexts[self.index]
        return Context(told.tokens, told.text)


def told_together(records: list[BlockRecord]) -> list[list[BlockRecord]]:
    """The records by the update that wrote them, as far as its idempotency key tells and all of it is there."""
    together: list[list[BlockRecord]] = []
    for key, group in groupby(records, key=lambda r: r.idempotency and r.idempotency.key):
        part = list(group)
        marks = [r.idempotency for r in part if r.idempotency is not None]
        whole = key is not None and [m.index for m in marks] == list(range(marks[0].total))
        together += [part] if whole else [[record] for record in part]
    return together


class Rebuilds:
    """Rebuilds that wait for their turn or have it."""

    def __init__(self, engine: Engine, residency: Residency, store: Store) -> None:
        self.engine, self.residency, self.store = engine, residency, store
        self._runs: dict[str, RebuildRun] = {}

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._runs

    def run(self, job_id: str) -> RebuildRun:
        return self._runs[job_id]

    # ------------------------------------------------------------ what there is to tell

    def texts(self, message: GetTexts) -> Texts:
        """The kept texts, an update each; none if some are missing of a memory of this model, which is well as it is:
        a rebuild that is forced says so. Runs in any thread. Raises TextsNotKept."""
        try:
            manifest, records = self._records(message.tenant)
        except TextsNotKept:
            manifest, records = self.engine.tenants.manifest(message.tenant), []
            if manifest.fingerprint != self.residency.fingerprint:
                raise
        return Texts(
            tenant=manifest.tenant,
            memory_version=manifest.version,
            lineage=manifest.lineage,
            current=manifest.fingerprint == self.residency.fingerprint,
            texts=[
                KeptText(
                    group[0].version,
                    sum(record.tokens for record in group),
                    "".join(record.text or "" for record in group),
                )
                for group in told_together(records)
            ],
        )

    def _records(self, tenant: str) -> tuple[Manifest, list[BlockRecord]]:
        manifest = self.engine.tenants.manifest(tenant)
        records = [r for r in self.store.history(tenant) if r.version <= manifest.version]
        missing = sum(record.text is None for record in records)
        if missing or (manifest.version and not records):
            raise TextsNotKept(
                f"the texts of {missing or manifest.version} of this memory's {manifest.version} blocks are not kept, "
                "and it cannot be rebuilt without them"
            )
        return manifest, records

    # ------------------------------------------------------------ beginning

    def queue(self, message: RebuildTenant) -> None:
        """Puts it at the end of the tenant's queue. Raises InvalidRequest, TenantBusy, ServerBusy."""
        most = self.residency.backbone.config.max_context
        for context in message.contexts:
            self.engine.check_tokens(context.tokens, "text")
            if len(context.tokens) > most:
                raise InvalidRequest(f"a context takes at most {most} tokens")
        job = Job(
            id=message.id,
            tenant=message.tenant,
            kind=Kind.UPDATE,
            length=0,
            arrival=time.monotonic(),
            waiting_tokens=sum(len(context.tokens) for context in message.contexts),
            held_first=True,
            needs_memory=False,
            rebuilds=True,
        )
        self.engine.scheduler.submit(job)
        self._runs[job.id] = RebuildRun(job, message)

    def start(self, job: Job) -> None:
        """The job's turn has come."""
        run = self._runs[job.id]

        def work() -> tuple[Manifest, list[BlockRecord]]:
            self.store.claim(job.tenant)
            manifest, records = self._records(job.tenant)
            if (manifest.lineage, manifest.version) != (run.message.lineage, run.message.memory_version):
                raise VersionConflict("the memory was updated before its rebuild began", retry_after=0.1)
            self._check_complete(manifest, records, len(run.message.contexts))
            if run.message.contexts:
                own, width = self.residency.own_pool.hidden, self.residency.backbone.dtype.itemsize
                check_bytes(own.numel() * width, run.message.most_bytes)
            return manifest, records

        def begin(result: object) -> None:
            assert isinstance(result, tuple)
            run.old, run.records = result
            own, backbone = self.residency.own_pool, self.residency.backbone
            run.pool = Pool(own.hidden.cpu(), own.born)
            run.version = run.records[0].version - 1 if run.records else 0
            if backbone.weights.initialized:
                num_tokens = backbone.config.num_tokens
                run.tail = own.hidden[:, -num_tokens:].to(backbone.device, backbone.dtype, copy=True)
            self._next(run)

        self._behind(run, work, begin)

    def _check_complete(self, manifest: Manifest, records: list[BlockRecord], contexts: int) -> None:
        """Raises TextsNotKept if blocks whose records are gone would still be remembered."""
        first = records[0].version if records else 1
        if first == 1:
            return
        config = self.residency.backbone.config
        forgotten = self.residency.backbone.weights.initialized and covered(
            manifest.seed,
            range(first, first + contexts),
            pool_size=config.pool_size,
            num_tokens=config.num_tokens,
            num_layers=config.num_layers,
            per_layer=config.drop_memory_per_layer,
        )
        if not forgotten:
            raise TextsNotKept(
                f"the texts before version {first} are not kept, and not all of them is forgotten"
            )

    # ------------------------------------------------------------ context by context

    def _next(self, run: RebuildRun) -> None:
        if run.index == len(run.message.contexts):
            self._replace(run)
            return
        tokens, config = len(run.context.tokens), self.residency.backbone.config
        if run.tail is None and tokens < config.num_tokens:
            self._end(
                run,
                ContextTooShort(
                    f"the first text of an empty memory takes at least {config.num_tokens} tokens, the kept one "
                    f"has {tokens}"
                ),
            )
            return
        run.current = self.residency.backbone.begin_update(run.tail, tokens)
        run.job.length, run.job.done, run.job.tail = tokens, 0, run.current.tail_length
        run.job.atomic = tokens < config.num_tokens
        run.job.phase = Phase.PREFILL

    def computed(self, run: RebuildRun) -> None:
        """The current context's forward pass is complete."""
        assert run.current is not None
        assert run.old is not None
        run.job.phase, run.job.working = Phase.HELD, False
        config, hidden, first = self.residency.backbone.config, run.current.block, run.tail is None
        run.current = None
        if first:
            hidden = self.residency.backbone.first_block(hidden)
        if not bool(torch.isfinite(hidden).all()):
            self._end(
                run, ServiceError("the model produced numbers that are not finite; nothing was changed")
            )
            return
        run.version, run.tail, run.index = run.version + 1, hidden, run.index + 1
        seed, version, after = run.old.seed, run.version, self.residency.issued()

        def work() -> Block:
            forgotten = None
            if not first:
                forgotten = draw(
                    seed,
                    version,
                    pool_size=config.pool_size,
                    num_tokens=config.num_tokens,
                    num_layers=config.num_layers,
                    per_layer=config.drop_memory_per_layer,
                )
            return Block(self.residency.fetch(hidden, after), forgotten)

        def kept(block: object) -> None:
            assert isinstance(block, Block)
            run.fresh.append((version, block))
            self.engine.emit(UpdateProgress(run.job.id, run.index, len(run.message.contexts), version))
            if len(run.fresh) < config.num_blocks:
                self._next(run)
            else:
                self._fold(run)

        self._behind(run, work, kept)

    def _fold(self, run: RebuildRun) -> None:
        """Puts the fresh blocks into the pool: a memory of thousands of updates takes no more room than two pools."""

        def folded(result: object) -> None:
            assert isinstance(result, Pool)
            run.pool, run.fresh = result, []
            self._next(run)

        self._behind(run, lambda: self._folded(run), folded)

    @staticmethod
    def _folded(run: RebuildRun) -> Pool:
        assert run.pool is not None
        return replay(run.pool, run.fresh)

    # ------------------------------------------------------------ the swap

    def _replace(self, run: RebuildRun) -> None:
        old = run.old
        assert old is not None
        run.job.phase = Phase.HELD

        def work() -> TenantInfo:
            new = Manifest(
                tenant=old.tenant,
                seed=old.seed,
                fingerprint=self.residency.fingerprint,
                created=old.created,
                version=run.version,
            )
            snapshot = encode_snapshot(self._folded(run)) if run.version else None
            manifest = self.store.replace(old.tenant, old, new, snapshot, self._retold(run))
            return self.engine.tenants.info(manifest, "cold")

        def done(result: object, error: ServiceError | None) -> None:
            if (
                error is None
                or isinstance(error, StoreFailed | VersionConflict)
                or type(error) is ServiceError
            ):
                self.residency.renew(run.job.tenant)
            self._end(run, run.doomed or error, result)

        self.engine.background(run.job.tenant, work, done)

    @staticmethod
    def _retold(run: RebuildRun) -> list[BlockRecord]:
        """A record for each new block: the time of the one it comes from, and the update's mark as it is now."""
        groups = {group[0].version: group for group in told_together(run.records)}
        version, retold = run.version - len(run.message.contexts), list[BlockRecord]()
        for origin, part in groupby(run.message.contexts, key=lambda context: context.memory_version):
            contexts, group = [Context(c.tokens, c.text) for c in part], groups[origin]
            mark, of_all = group[0].idempotency, digest(Update("", "", contexts))
            whole = mark is not None and len(group) == mark.total
            for index, context in enumerate(contexts):
                version += 1
                # the mark of an update that is not whole stays: a retry must not be taken for a new update
                told = mark
                if mark is not None and whole:
                    told = Idempotency(mark.key, index, len(contexts), of_all)
                at = group[min(index, len(group) - 1)].time
                retold.append(BlockRecord(version, _NO_BLOB, at, len(context.tokens), context.text, told))
        return retold

    # ------------------------------------------------------------ ending

    def _behind(self, run: RebuildRun, work: Callable[[], object], then: Callable[[object], None]) -> None:
        """Runs ``work`` in a thread and goes on with its result, unless the rebuild ends meanwhile."""

        def done(result: object, error: ServiceError | None) -> None:
            error = run.doomed or error
            if error is not None:
                self._end(run, error)
            else:
                then(result)

        self.engine.background(run.job.tenant, work, done)

    def fail(self, job: Job, error: ServiceError) -> None:
        """Ends the rebuild; at once, or when its thread comes back."""
        run = self._runs[job.id]
        if job.phase is Phase.HELD:
            run.doomed = error
        else:
            self._end(run, error)

    def _end(self, run: RebuildRun, error: ServiceError | None, result: object = None) -> None:
        del self._runs[run.job.id]
        self.engine.finish(run.job)
        if error is not None:
            self.engine.fail(run.job.id, error)
        else:
            assert isinstance(result, TenantInfo)
            self.engine.emit(Reply(run.job.id, result))
