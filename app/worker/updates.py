"""An update while it runs: which of its contexts are durable, and the self-update of the current one.

The commit protocol of the worker in one place: forward pass -> block -> store -> published in the pool ->
acknowledged. A block that is not durable is never published; one that is not published is never told of.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog
import torch
from torch import Tensor

from app import logs
from app.errors import (
    ContextTooShort,
    IdempotencyConflict,
    ServiceError,
    StoreFailed,
    StoreFull,
    VersionConflict,
)
from app.memory.arena import Memory
from app.memory.codec import Block, encode_block
from app.memory.residency import Residency
from app.messages import Context, Update
from app.model.batch import SelfUpdate
from app.model.forgetting import Change, change, draw
from app.store.base import BlockRecord, Idempotency, Manifest
from app.worker import quotas
from app.worker.jobs import Job, Phase

log = structlog.get_logger("worker")

Background = Callable[[str, Callable[[], object], Callable[[object, ServiceError | None], None]], None]
"""Runs the first function off the loop's thread for a tenant, then hands result and error to the second in the loop."""


@dataclass(eq=False)
class UpdateRun:
    """``index`` of the context that is being written, onto the memory's ``version``; ``versions`` of those that are
    durable and published; ``read``: whether the memory had a copy for readers when one of its blocks was published.
    ``block`` [L, K, d] is the newest one until it is published, and ``change``, once it is durable, what that makes of
    the ranks: None for a block that fills the memory."""

    job: Job
    message: Update
    memory: Memory
    digest: str
    index: int = 0
    version: int = 0
    current: SelfUpdate | None = None
    block: Tensor | None = None
    change: Change | None = None
    committing: bool = False
    read: bool = False
    doomed: ServiceError | None = None
    started: float = 0.0
    loaded: float = 0.0
    versions: list[int] = field(default_factory=list)

    @property
    def contexts(self) -> list[Context]:
        return self.message.contexts

    @property
    def context(self) -> Context:
        return self.contexts[self.index]

    @property
    def tokens(self) -> int:
        return sum(len(c.tokens) for c in self.contexts)


def digest(message: Update) -> str:
    """A hash of an update's contexts: the same key with another text is a mistake of the caller."""
    state = hashlib.blake2b(digest_size=16)
    for context in message.contexts:
        state.update(len(context.tokens).to_bytes(8))
        state.update(b"".join(token.to_bytes(8) for token in context.tokens))
    return state.hexdigest()


def compaction_interval(num_blocks: int) -> int:
    """Blocks behind a snapshot when the next one is written: a few less than a pool has, so that a tenant with its
    kept texts never takes more than about two pools."""
    return max(1, num_blocks * 9 // 10)


class Updates:
    """Carries update runs from context to context. ``background`` runs a function off the loop's thread."""

    def __init__(
        self,
        residency: Residency,
        background: Background,
        *,
        progress: Callable[[UpdateRun], None],
        finished: Callable[[UpdateRun, list[BlockRecord] | None], None],
        failed: Callable[[UpdateRun, ServiceError], None],
        compacted_after: int,
    ) -> None:
        self.residency = residency
        self._background = background
        self._progress, self._finished, self._failed = progress, finished, failed
        self._compacted_after = compacted_after
        self._compacting: set[str] = set()
        self._unpublished: list[UpdateRun] = []
        self.taken = quotas.Taken()
        self._seconds = 0.0
        self.commits = 0
        self.committed_bytes = 0
        self.compactions = 0
        # from nothing on: a series that begins with its first failure has never risen
        codes = (StoreFailed.code, StoreFull.code, ServiceError.code)
        self.failed_compactions: Counter[str] = Counter(dict.fromkeys(codes, 0))

    # ------------------------------------------------------------ beginning

    def begin(self, run: UpdateRun) -> None:
        """Starts the first context; first looks up what the idempotency key has done, and what the tenant may do."""
        message = run.message
        if message.idempotency_key is None and not message.updates_per_day and not message.most_bytes:
            self._next(run)
            return
        run.committing = True

        def look() -> list[BlockRecord]:
            store, key = self.residency.store, message.idempotency_key
            records = [] if key is None else store.find(message.tenant, key)
            # what was done before is answered, whatever the limits are now
            remaining = len(run.contexts) - len(records)
            if remaining > 0:
                quotas.check(store, self.taken, message, remaining, self._block_bytes, time.time())
            return records

        def done(result: object, error: ServiceError | None) -> None:
            run.committing = False
            if error is not None or run.doomed is not None:
                self._failed(run, error or run.doomed or StoreFailed("the store did not answer"))
                return
            assert isinstance(result, list)
            self._resume(run, result)

        self._background(run.job.tenant, look, done)

    @property
    def _block_bytes(self) -> int:
        """Bytes of a block's hidden states in the store, about."""
        config = self.residency.backbone.config
        vectors = config.num_layers * config.num_tokens
        return vectors * config.hidden_size * self.residency.backbone.dtype.itemsize

    def _resume(self, run: UpdateRun, records: list[BlockRecord]) -> None:
        marks = [r.idempotency for r in records if r.idempotency is not None]
        if any(m.digest != run.digest or m.total != len(run.contexts) for m in marks):
            self._failed(run, IdempotencyConflict("this idempotency key was used with another text"))
        elif marks and marks[-1].index == marks[-1].total - 1:
            self._finished(run, records)
        else:
            # a crash cut this update short: go on behind the last context that is durable
            run.index = marks[-1].index + 1 if marks else 0
            run.versions = [r.version for r in records]
            self._next(run)

    def _next(self, run: UpdateRun) -> None:
        tokens = len(run.context.tokens)
        config = self.residency.backbone.config
        if not run.memory.initialized and tokens < config.num_tokens:
            self._failed(
                run,
                ContextTooShort(
                    f"the first update of an empty memory takes at least {config.num_tokens} tokens, "
                    f'this one has {tokens}; send more, or "short": "fill" to have it repeated',
                    param="text",
                ),
            )
            return
        run.current = self.residency.backbone.begin_update(run.memory.tail, tokens)
        run.version = run.memory.version
        run.job.length, run.job.done, run.job.working = tokens, 0, False
        run.job.tail = run.current.tail_length
        run.job.atomic = tokens < config.num_tokens
        run.job.phase = Phase.PREFILL

    # ------------------------------------------------------------ committing

    def computed(self, run: UpdateRun) -> None:
        """The current context's forward pass is complete: writes its block to the store."""
        assert run.current is not None
        run.job.phase = Phase.HELD
        memory, config = run.memory, self.residency.backbone.config
        hidden, initialized = run.current.block, memory.initialized
        run.current = None
        if not initialized:
            hidden = self.residency.backbone.first_block(hidden)
        if not bool(torch.isfinite(hidden).all()):
            self._failed(
                run, ServiceError("the model produced numbers that are not finite; nothing was changed")
            )
            return
        run.block = hidden
        run.committing = True
        key = run.message.idempotency_key
        mark = None if key is None else Idempotency(key, run.index, len(run.contexts), run.digest)
        context, version = run.context, memory.version
        # nobody changes these: the next version gets others
        seed, rank, born = memory.seed, memory.view.rank, memory.born
        lineage, created = memory.lineage, memory.created
        after = self.residency.issued()

        def work() -> object:
            forgotten = made = None
            if initialized:
                forgotten = draw(
                    seed,
                    version + 1,
                    pool_size=config.pool_size,
                    num_tokens=config.num_tokens,
                    num_layers=config.num_layers,
                    per_layer=config.drop_memory_per_layer,
                )
                # here, because the device waits for the loop
                made = change(rank, born, forgotten, version + 1)
            host = self.residency.fetch(hidden, after)
            blob = encode_block(Block(host, forgotten))
            manifest = self.residency.store.commit(
                run.job.tenant,
                version,
                blob,
                time=time.time(),
                tokens=len(context.tokens),
                text=context.text,
                idempotency=mark,
                lineage=lineage,
                created=created,
            )
            return manifest, len(blob), host, made

        self._background(run.job.tenant, work, lambda result, error: self._committed(run, result, error))

    def _committed(self, run: UpdateRun, result: object, error: ServiceError | None) -> None:
        run.committing = False
        if error is not None:
            if isinstance(error, StoreFailed | VersionConflict) or type(error) is ServiceError:
                self.residency.distrust(run.job.tenant)
            self._failed(run, error)
            return
        assert isinstance(result, tuple)
        manifest, size, host, run.change = result
        if not self.residency.arena.publishable(run.memory):
            # as long as somebody reads the version before, others may have its room on the device
            run.block, run.job.working = host, False
        if run.message.updates_per_day:
            self.taken.note(run.job.tenant, [manifest.blocks[-1].time])
        self.commits += 1
        self.committed_bytes += size
        self._compact_if_due(manifest)
        # published at the next step, with those that were committed meanwhile
        self._unpublished.append(run)

    def publish(self) -> None:
        """Publishes the durable blocks whose slots nobody reads any more. Called at every step."""
        if not self._unpublished:
            return
        arena = self.residency.arena
        ready = [run for run in self._unpublished if arena.publishable(run.memory)]
        self._unpublished = [run for run in self._unpublished if run not in ready]
        began = time.monotonic()
        for run in ready:
            # the block would be written into what another tenant reads
            arena.check(run.memory)
            run.read = run.read or run.memory.view.hot is not None
        blocks = []
        for run in ready:
            assert run.block is not None
            blocks.append((run.memory, run.block, run.change))
        arena.publish_all(blocks)
        for run in ready:
            if run.read and run.index + 1 == len(run.contexts):
                self.residency.prepare_ahead(run.memory)
        self._seconds += time.monotonic() - began
        for run in ready:
            run.block = run.change = None
            run.versions.append(run.memory.version)
            run.index += 1
            self._progress(run)
            if run.index == len(run.contexts):
                self._finished(run, None)
            elif run.doomed is not None:
                self._failed(run, run.doomed)
            else:
                self._next(run)

    def take_seconds(self) -> float:
        """How long publishing has held up the loop since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    # ------------------------------------------------------------ compaction

    def _compact_if_due(self, manifest: Manifest) -> None:
        """Once as many blocks as the pool holds lie behind the snapshot, a new snapshot replaces them."""
        tenant = manifest.tenant
        if len(manifest.blocks) < self._compacted_after or tenant in self._compacting:
            return
        self._compacting.add(tenant)

        def done(_: object, error: ServiceError | None) -> None:
            self._compacting.discard(tenant)
            if error is None:
                self.compactions += 1
                return
            # it loses nothing, and the next commit tries again; but the memory takes more and more room meanwhile
            self.failed_compactions[error.code] += 1
            write = log.warning if error.serious else log.info
            write("compaction failed", version=manifest.version, **logs.of_error(error))

        self._background(tenant, lambda: self.residency.compact(manifest), done)
