"""Seeded bugs of the worker's way of an update, each of which the bench of the worker must find.

A mutant is done to one worker, so that the oracle beside it stays sound: ``python -m tests.faults.worker_mutants``.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import torch
from torch import Tensor

from app.errors import ServiceError, StoreFailed
from app.memory.arena import Arena, Memory
from app.memory.codec import encode_snapshot
from app.memory.residency import Erasure
from app.memory.warm import Warm
from app.messages import Timings, Updated, UpdateProgress
from app.model.forgetting import Change, change, draw
from app.store.base import BlockRecord, Manifest, content
from app.worker.updates import UpdateRun
from tests.faults.ledger import Violation
from tests.faults.oracle import Oracle
from tests.faults.worker import WorkerBench
from tests.harness import Harness, load_backbone

SCRIPTS = 60
Mutate = Callable[[Harness], None]


def _put(target: object, **methods: Any) -> None:
    """Replaces methods of one object."""
    for name, method in methods.items():
        setattr(target, name, method)


Publish = Callable[[Memory, Tensor, Change | None], None]


def _publishing(arena: Arena) -> Publish:
    """The arena's own way of publishing a block, whatever is put in its place."""
    whole = arena.publish_all
    return lambda memory, hidden, made: whole([(memory, hidden, made)])


def _publish_by(arena: Arena, one: Publish) -> None:
    _put(arena, publish_all=lambda blocks: [one(*block) for block in blocks])


def _next_change(worker: Harness, memory: Memory) -> Change | None:
    """What the thread that commits is about to work out."""
    config = worker.engine.backbone.config
    if not memory.initialized:
        return None
    forgotten = draw(
        memory.seed,
        memory.version + 1,
        pool_size=config.pool_size,
        num_tokens=config.num_tokens,
        num_layers=config.num_layers,
        per_layer=config.drop_memory_per_layer,
    )
    return change(memory.view.rank, memory.born, forgotten, memory.version + 1)


def _nothing(*_: Any, **__: Any) -> None: ...


# ---------------------------------------------------------------- told, published and written in another order


def _updated(run: UpdateRun) -> Updated:
    return Updated(run.job.id, run.memory.version + 1, len(run.contexts), run.tokens, 1.0, Timings())


def _acknowledged_before_the_commit(worker: Harness) -> None:
    updates, computed = worker.engine.updates, worker.engine.updates.computed

    def early(run: UpdateRun) -> None:
        if run.index == len(run.contexts) - 1:
            worker.engine.emit(_updated(run))
        computed(run)

    _put(updates, computed=early)


def _told_before_the_commit(worker: Harness) -> None:
    updates, computed = worker.engine.updates, worker.engine.updates.computed

    def early(run: UpdateRun) -> None:
        told = UpdateProgress(run.job.id, run.index + 1, len(run.contexts), run.memory.version + 1)
        worker.engine.emit(told)
        computed(run)

    _put(updates, computed=early, _progress=_nothing)


def _acknowledged_at_the_first_context(worker: Harness) -> None:
    updates, progress = worker.engine.updates, worker.engine.updates._progress

    def early(run: UpdateRun) -> None:
        progress(run)
        if run.index == 1 < len(run.contexts):
            worker.engine.emit(msgspec.structs.replace(_updated(run), memory_version=run.memory.version))

    _put(updates, _progress=early)


def _published_before_the_commit(worker: Harness) -> None:
    updates, computed = worker.engine.updates, worker.engine.updates.computed
    arena = worker.engine.arena
    publish = _publishing(arena)
    published: list[Tensor] = []

    def early(run: UpdateRun) -> None:
        computed(run)
        if run.block is not None and arena.publishable(run.memory):
            publish(run.memory, run.block, _next_change(worker, run.memory))
            published.append(run.block)

    def once(memory: Memory, hidden: Tensor, made: Change | None) -> None:
        if not any(hidden is other for other in published):
            publish(memory, hidden, made)

    _put(updates, computed=early)
    _publish_by(arena, once)


def _never_published(worker: Harness) -> None:
    arena = worker.engine.arena
    publish = _publishing(arena)

    def empty(memory: Memory, hidden: Tensor, made: Change | None) -> None:
        key, value = worker.engine.arena.pools.parts(memory.slot)[:2]
        before = key.clone(), value.clone()
        publish(memory, hidden, made)
        key.copy_(before[0])
        value.copy_(before[1])

    _publish_by(arena, empty)


# ---------------------------------------------------------------- failures


def _failure_taken_for_done(worker: Harness) -> None:
    updates, committed = worker.engine.updates, worker.engine.updates._committed

    def careless(run: UpdateRun, result: object, error: ServiceError | None) -> None:
        if error is not None:
            manifest = Manifest(run.job.tenant, 0, "", 0.0)
            result, error = (manifest, 0, run.block, _next_change(worker, run.memory)), None
        committed(run, result, error)

    _put(updates, _committed=careless)


def _failure_not_distrusted(worker: Harness) -> None:
    _put(worker.engine.residency, distrust=_nothing)


def _failed_commit_again(worker: Harness) -> None:
    """A commit whose outcome is not known is made again, at whatever version the memory has."""
    store, commit = worker.store, worker.store.commit

    def again(tenant: str, expected_version: int, blob: bytes, **rest: Any) -> Manifest:
        try:
            return commit(tenant, expected_version, blob, **rest)
        except StoreFailed:
            now = store.load(tenant)
            return commit(tenant, expected_version if now is None else now.version, blob, **rest)

    _put(store, commit=again)


# ---------------------------------------------------------------- idempotency


def _committed(worker: Harness, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """``change`` of what a commit is told."""
    commit = worker.store.commit
    _put(
        worker.store,
        commit=lambda tenant, version, blob, **rest: commit(tenant, version, blob, **change(rest)),
    )


def _key_not_kept(worker: Harness) -> None:
    _committed(worker, lambda rest: {**rest, "idempotency": None})


def _place_not_kept(worker: Harness) -> None:
    def change(rest: dict[str, Any]) -> dict[str, Any]:
        mark = rest["idempotency"]
        return {**rest, "idempotency": None if mark is None else msgspec.structs.replace(mark, index=0)}

    _committed(worker, change)


def _key_not_looked_for(worker: Harness) -> None:
    _put(worker.store, find=lambda tenant, key: [])


def _other_text_not_compared(worker: Harness) -> None:
    updates, resume = worker.engine.updates, worker.engine.updates._resume

    def careless(run: UpdateRun, records: list[BlockRecord]) -> None:
        if records and records[0].idempotency is not None:
            run.digest = records[0].idempotency.digest
        resume(run, records)

    _put(updates, _resume=careless)


def _resumed(worker: Harness, index: Callable[[int, int], int]) -> None:
    """An update that was cut short goes on at ``index`` (of contexts done, of all)."""
    updates, resume = worker.engine.updates, worker.engine.updates._resume

    def elsewhere(run: UpdateRun, records: list[BlockRecord]) -> None:
        if not 0 < len(records) < len(run.contexts):
            resume(run, records)
            return
        run.index = index(len(records), len(run.contexts))
        run.versions = [record.version for record in records]
        updates._next(run)

    _put(updates, _resume=elsewhere)


def _resumed_from_the_beginning(worker: Harness) -> None:
    _resumed(worker, lambda done, total: 0)


def _resumed_too_late(worker: Harness) -> None:
    _resumed(worker, lambda done, total: min(done + 1, total - 1))


def _half_done_taken_for_done(worker: Harness) -> None:
    updates, resume = worker.engine.updates, worker.engine.updates._resume

    def careless(run: UpdateRun, records: list[BlockRecord]) -> None:
        if records:
            updates._finished(run, records)
        else:
            resume(run, records)

    _put(updates, _resume=careless)


def _replayed_at_the_version_now(worker: Harness) -> None:
    updates, finished = worker.engine.updates, worker.engine.updates._finished

    def now(run: UpdateRun, records: list[BlockRecord] | None) -> None:
        if records:
            last = msgspec.structs.replace(records[-1], version=run.memory.version)
            records = [*records[:-1], last]
        finished(run, records)

    _put(updates, _finished=now)


# ---------------------------------------------------------------- the wrong place


def _wrong_slot(worker: Harness) -> None:
    arena, write = worker.engine.arena, worker.engine.arena._write

    def beside(pools: list[int], hidden: tuple[Tensor, ...], slots: Tensor) -> None:
        write([(pool + 1) % arena.slots for pool in pools], hidden, slots)

    _put(arena, _write=beside)


def _wrong_tenant(worker: Harness) -> None:
    store, commit = worker.store, worker.store.commit

    def elsewhere(tenant: str, expected_version: int, blob: bytes, **rest: Any) -> Manifest:
        for other in store.tenants():
            manifest = store.load(other)
            if other != tenant and manifest is not None and manifest.version == expected_version:
                return commit(other, expected_version, blob, **{**rest, "lineage": None, "created": None})
        return commit(tenant, expected_version, blob, **rest)

    _put(store, commit=elsewhere)


def _wrong_draw(worker: Harness) -> None:
    updates, background = worker.engine.updates, worker.engine.updates._background

    def behind(tenant: str, work: Callable[[], object], done: Any) -> None:
        def drawn() -> object:
            late = lambda seed, version, **rest: draw(seed, version - 1, **rest)  # noqa: E731
            with mock.patch("app.worker.updates.draw", late):
                return work()

        background(tenant, drawn, done)

    _put(updates, _background=behind)


def _others_forgotten(worker: Harness) -> None:
    """The pool forgets other ranks than the store was told."""
    arena = worker.engine.arena
    publish = _publishing(arena)

    def oldest(memory: Memory, hidden: Tensor, made: Change | None) -> None:
        if made is not None:
            oldest_ranks = torch.arange(made.slots.shape[1]).expand(len(made.born), -1)
            made = change(memory.view.rank, memory.born, oldest_ranks, made.version)
        publish(memory, hidden, made)

    _publish_by(arena, oldest)


def _tail_stays(worker: Harness) -> None:
    arena = worker.engine.arena
    publish = _publishing(arena)

    def publish_all_but(memory: Memory, hidden: Tensor, made: Change | None) -> None:
        assert memory.tail is not None
        tail = memory.tail.clone()
        publish(memory, hidden, made)
        memory.tail.copy_(tail)

    _publish_by(arena, publish_all_but)


def _readers_not_awaited(worker: Harness) -> None:
    """A block takes slots that a running generation still reads."""
    arena = worker.engine.arena
    publish = _publishing(arena)

    def under_readers(memory: Memory, hidden: Tensor, made: Change | None) -> None:
        read = [view for view in memory.older if view.hot is not None]
        publish(memory, hidden, made)
        for view in read:
            assert view.hot is not None
            arena.build_hot(memory.slot, memory.view.rank, view.hot)

    _put(arena, publishable=lambda memory: True)
    _publish_by(arena, under_readers)


# ---------------------------------------------------------------- compaction, rollback, erasure, tiers


def _snapshot_without_the_newest(worker: Harness) -> None:
    residency = worker.engine.residency

    def compact(manifest: Manifest) -> Manifest:
        early = msgspec.structs.replace(manifest, blocks=manifest.blocks[:-1])
        snapshot = encode_snapshot(residency.pool(early))
        return worker.store.compact(manifest.tenant, manifest.version, snapshot, lineage=manifest.lineage)

    _put(residency, compact=compact)


def _rolled_back_unseen(worker: Harness) -> None:
    _put(worker.engine.residency, renew=_nothing)


def _erased_stays_resident(worker: Harness) -> None:
    _put(worker.engine.residency, erase=lambda tenant: Erasure([], _nothing, _nothing))


def _warm_copy_believed(worker: Harness) -> None:
    """A rollback leaves the warm copy, and nobody compares it with the store."""
    residency = worker.engine.residency
    loader, load = residency._loader, residency._loader.load

    def believing(tenant: str, slot: int, after: Any, warm: Warm | None, leaving: Any) -> Any:
        manifest = worker.store.load(tenant)
        if warm is not None and manifest is not None:
            warm = dataclasses.replace(warm, content=content(manifest))
        return load(tenant, slot, after, warm, leaving)

    def renew(tenant: str) -> None:
        if tenant in residency._resident or tenant in residency._loading:
            residency.distrust(tenant)

    _put(residency, renew=renew)
    _put(loader, load=believing)


def _left_while_written(worker: Harness) -> None:
    """A memory may leave its slot under an update: another tenant's comes there."""
    residency = worker.engine.residency

    def anybody() -> Memory | None:
        held = [m for m in residency._resident.values() if not m.older and not m.view.readers]
        return min(held, key=lambda m: m.used, default=None)

    def evict(self: Arena, memory: Memory) -> None:
        self._cool(memory.view)
        self.give_slot(memory.slot)

    _put(residency, _victim=anybody)
    _put(worker.engine.arena, evict=lambda memory: evict(worker.engine.arena, memory))


MUTANTS: dict[str, Mutate] = {
    "acknowledged before the commit": _acknowledged_before_the_commit,
    "told of before the commit": _told_before_the_commit,
    "acknowledged at the first of several contexts": _acknowledged_at_the_first_context,
    "published before the commit": _published_before_the_commit,
    "published without its keys and values": _never_published,
    "a failed commit is taken for done": _failure_taken_for_done,
    "a memory is trusted after a failed commit": _failure_not_distrusted,
    "a failed commit is made again": _failed_commit_again,
    "the idempotency key is not kept": _key_not_kept,
    "the place in the update is not kept": _place_not_kept,
    "the idempotency key is not looked for": _key_not_looked_for,
    "another text under the same key is not noticed": _other_text_not_compared,
    "an update cut short begins anew": _resumed_from_the_beginning,
    "an update cut short leaves a context out": _resumed_too_late,
    "an update cut short is taken for done": _half_done_taken_for_done,
    "a retry is told the version of now": _replayed_at_the_version_now,
    "a block is written into another tenant's slot": _wrong_slot,
    "a block is committed to another tenant": _wrong_tenant,
    "the draw is another version's": _wrong_draw,
    "the pool forgets other tokens than the store": _others_forgotten,
    "the tail is not the newest block": _tail_stays,
    "readers of an older version are not awaited": _readers_not_awaited,
    "a snapshot is without the newest block": _snapshot_without_the_newest,
    "a rollback leaves the resident memory": _rolled_back_unseen,
    "an erasure leaves the resident memory": _erased_stays_resident,
    "a rollback leaves the warm copy, which is believed": _warm_copy_believed,
    "a memory leaves its slot while it is written": _left_while_written,
}


def caught(name: str, oracle: Oracle, folder: Path, first: int = 0) -> str | None:
    """How the bench found the mutant in its scripts from ``first`` on; None if it did not."""
    bench = WorkerBench(oracle, folder, MUTANTS[name])
    try:
        for seed in range(first, first + SCRIPTS):
            bench.run(seed)
    except Violation as violation:
        return str(violation)
    return None


def main() -> int:
    oracle, missed = Oracle(load_backbone("plain")[0]), []
    for name in MUTANTS:
        with tempfile.TemporaryDirectory() as folder:
            how = caught(name, oracle, Path(folder))
        print(f"{'caught' if how else 'MISSED':8}{name}: {(how or '')[:110]}", flush=True)
        missed += [] if how else [name]
    print(f"{len(MUTANTS) - len(missed)} of {len(MUTANTS)} caught")
    return min(len(missed), 1)


if __name__ == "__main__":
    sys.exit(main())
