"""Random requests to a worker whose disk fails and whose process dies: ``python -m tests.faults worker``.

Clients update, read, roll back and erase a few tenants, and send keyed updates again until they are answered. Calls
to the disk fail at random, and at random the power does. At every answer the disk is looked at as a power failure would
leave it: what was acknowledged is there, once, at the version that was told, and nothing was read that was never
durable.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from unittest import mock

import torch

from app.errors import ServiceError
from app.memory.arena import Arena
from app.messages import (
    Answer,
    Context,
    EraseTenant,
    Failed,
    Finished,
    Generate,
    Reply,
    RollbackTenant,
    Sampling,
    Score,
    Scored,
    Tokens,
    Update,
    Updated,
    UpdateProgress,
)
from app.store import ahead, journal
from app.store.disk import DiskStore
from tests.faults.ledger import Violation
from tests.faults.model import PATIENCE
from tests.faults.oracle import CONTINUATION, MOST_TOKENS, PROMPT, Oracle, Told, tokens_of
from tests.faults.promises import TENANTS, Order, Promises, Removal
from tests.harness import Harness
from tests.store.memorydisk import Crash, MemoryDisk

_SLOTS = 2
_ACTIONS = 24
_COMPACTED_AFTER = 4
_TRIES = 5
# what a client may be told at any time, and what only where the disk fails
_USUAL = {"tenant_erased", "tenant_not_found"}
_TROUBLE = {"store_failed", "store_full", "version_conflict"}


@dataclass
class Reading:
    """``least`` is the version that the reader had been told of; ``since`` when (an index into the states seen)."""

    tenant: str
    least: int
    since: int
    tokens: list[int] = field(default_factory=list)


@dataclass
class Done:
    """What a bench has gone through."""

    scripts: int = 0
    answers: int = 0
    acknowledged: int = 0
    crashes: int = 0
    failures: int = 0


class WorkerBench:
    """``mutate`` is done to every worker that is started. ``run`` raises Violation."""

    def __init__(self, oracle: Oracle, root: Path, mutate: Callable[[Harness], None] | None = None) -> None:
        self.oracle, self.root, self.mutate = oracle, root, mutate
        self.backbone = oracle.backbone
        self.done = Done()
        self._roots = count()

    def run(self, seed: int) -> None:
        """One script from an empty disk to a worker at rest, everything that has a key done."""
        threads = torch.get_num_threads()
        # the model is so small that a second thread only adds waiting
        torch.set_num_threads(1)
        try:
            # short journals and few files ahead: their making would take up all the calls that fail, and their ends
            # would not be met
            with mock.patch.object(journal, "SMALLEST", 2048), mock.patch.object(ahead, "MADE_AT_ONCE", 2):
                _Script(self, random.Random(seed), faults=bool(seed % 4)).run()
        except Violation as violation:
            raise Violation(f"script {seed}: {violation}") from violation
        except (AssertionError, ServiceError) as error:
            raise Violation(f"script {seed}: the worker stops: {error!r}") from error
        finally:
            torch.set_num_threads(threads)
        self.done.scripts += 1

    def new_root(self) -> Path:
        """The store's lock is a real file, and one that crashed still has it."""
        return self.root / str(next(self._roots))


class _Script:
    def __init__(self, bench: WorkerBench, draw: random.Random, *, faults: bool) -> None:
        self.bench, self.oracle, self.draw, self.faults = bench, bench.oracle, draw, faults
        self.told = _USUAL | _TROUBLE if faults else _USUAL
        self.calm = draw.choice([60, 250])
        self.promises = Promises(bench.oracle, self._removals)
        self.orders = self.promises.orders
        self.open: dict[str, Order | Removal | Reading] = {}
        # by tenant, what was ever durable, in order
        self.seen: dict[str, list[Told]] = {tenant: [()] for tenant in TENANTS}
        self.taken = 0
        self.start(MemoryDisk(bench.new_root()))

    # ------------------------------------------------------------ the worker's life

    def start(self, disk: MemoryDisk) -> None:
        self.disk = disk
        disk.root.mkdir()
        self.store = DiskStore(disk.root, files=disk, patience=PATIENCE)
        warm = Arena.bytes_per_pool(self.bench.backbone) * 3 // 2
        self.worker = Harness(
            self.bench.backbone,
            store=self.store,
            slots=_SLOTS,
            warm_bytes=warm,
            compacted_after=_COMPACTED_AFTER,
        )
        if self.bench.mutate is not None:
            self.bench.mutate(self.worker)
        self.taken = 0
        if self.faults:
            self._arm()

    def _arm(self) -> None:
        """Some later call to the disk fails, before or after the thing was done, or is the last."""
        countdown = self.draw.randrange(10, self.calm)
        kind = self.draw.choice(["before", "after", "crash"])

        def hook(call: str, path: Path) -> None:
            nonlocal countdown, kind
            countdown -= 1
            if countdown > 0:
                return
            if kind == "crash":
                raise Crash
            countdown = self.draw.randrange(10, self.calm)
            kind = self.draw.choice(["before", "after", "crash"])
            self._hook(hook, kind)
            self.bench.done.failures += 1
            number = self.draw.choice([errno.EIO, errno.ENOSPC])
            raise OSError(number, os.strerror(number), str(path))

        self._hook(hook, kind)

    def _hook(self, hook: Callable[[str, Path], None], kind: str) -> None:
        nothing: Callable[[str, Path], None] = lambda call, path: None  # noqa: E731
        self.disk.before, self.disk.after = (nothing, hook) if kind == "after" else (hook, nothing)

    def crash(self) -> None:
        """The power fails; another worker starts on what is left."""
        self.bench.done.crashes += 1
        self._abandon()
        kept = self.draw.choice(["synced", "all", random.Random(self.draw.getrandbits(32))])
        left = self.disk.after_crash(kept)  # type: ignore[arg-type]
        for waiting in self.open.values():
            if isinstance(waiting, Order):
                waiting.open = False
            elif isinstance(waiting, Removal):
                self.promises.doubts[waiting.tenant].append(waiting)
        self.open = {}
        self.start(MemoryDisk(self.bench.new_root(), left.folder))
        self._look(self.disk, whole=True)
        for doubts in self.promises.doubts.values():
            doubts.clear()

    def _abandon(self) -> None:
        self.disk.before = self.disk.after = lambda call, path: None
        self.store.close()

    # ------------------------------------------------------------ the clients

    def run(self) -> None:
        try:
            for _ in range(_ACTIONS):
                self._act()
                for _ in range(self.draw.choice([0, 1, 3, 12])):
                    self._step()
            self._settle()
        finally:
            self._abandon()

    def _settle(self) -> None:
        """The disk is well again: everything that has a key gets done, and every memory reads as it was told."""
        self._rest()
        self.faults = False
        self.disk.before = self.disk.after = lambda call, path: None
        for _ in range(_TRIES):
            left = [
                o for o in self.orders if o.key is not None and o.version is None and not self._usurped(o)
            ]
            if not left:
                break
            for order in left:
                self._send(order)
            self._rest()
        else:
            raise Violation(f"{left[0]} is never acknowledged")
        self.told = set()
        for tenant in TENANTS:
            self._read(tenant, score=True)
        self._rest()
        self._look(self.disk.after_crash("synced"), whole=True)

    def _usurped(self, order: Order) -> bool:
        """Whether another text has taken the order's key."""
        return any(o.key == order.key and o is not order for o in self.orders)

    def _removals(self, tenant: str) -> list[Removal]:
        return [o for o in self.open.values() if isinstance(o, Removal) and o.tenant == tenant]

    def _act(self) -> None:
        tenant = self.draw.choice(TENANTS)
        does = self.draw.choices(
            ["update", "again", "other text", "score", "generate", "rollback", "erase"], [8, 5, 1, 5, 4, 3, 1]
        )[0]
        mine = [o for o in self.orders if o.tenant == tenant and o.key is not None and not o.open]
        if does == "update":
            number = len(self.orders)
            texts = tuple(f"{tenant}-{number}-{i}" for i in range(self.draw.choice([1, 1, 2, 3])))
            order = Order(tenant, texts, f"key {number}" if self.draw.randrange(4) else None)
            self.orders.append(order)
            self._send(order)
        elif does == "again" and mine:
            self._send(self.draw.choice(mine))
        elif does == "other text" and mine:
            first = self.draw.choice(mine)
            texts = tuple(f"{tenant}-{len(self.orders)}-{i}" for i in range(len(first.texts)))
            self.orders.append(Order(tenant, texts, first.key))
            self._send(self.orders[-1])
        elif does in ("score", "generate"):
            self._read(tenant, score=does == "score")
        elif does in ("rollback", "erase") and self.promises.must[tenant]:
            # those far back are in a snapshot soon, and cannot be had any more
            kept = [0, *sorted(self.promises.must[tenant])][-4:-1]
            request = self.worker.id()
            if does == "erase":
                self.open[request] = Removal(tenant, 0, erases=True)
                self.worker.send(EraseTenant(request, tenant))
            else:
                version = self.draw.choice(kept)
                self.open[request] = Removal(tenant, version)
                self.worker.send(RollbackTenant(request, tenant, version))
                self._read(tenant, score=True)

    def _send(self, order: Order) -> None:
        request = self.worker.id()
        order.open = True
        self.open[request] = order
        contexts = [Context(tokens_of(text), text) for text in order.texts]
        self.worker.send(Update(request, order.tenant, contexts, order.key))

    def _read(self, tenant: str, *, score: bool) -> None:
        request = self.worker.id()
        self.open[request] = Reading(tenant, self.promises.version(tenant), len(self.seen[tenant]) - 1)
        if score:
            self.worker.send(Score(request, tenant, PROMPT, CONTINUATION))
        else:
            self.worker.send(Generate(request, tenant, PROMPT, Sampling(MOST_TOKENS)))

    # ------------------------------------------------------------ answers

    def _rest(self) -> None:
        for _ in range(10_000):
            self._step()
            if self.worker.engine.idle and not self.worker.inline.waiting:
                return
        raise Violation("the worker does not come to rest")

    def _step(self) -> None:
        try:
            self.worker.step()
        except Crash:
            self.crash()
            return
        answers, self.taken = self.worker.answers[self.taken :], len(self.worker.answers)
        if answers:
            for answer in answers:
                self._acknowledge(answer)
            found = self._look(self.disk.after_crash("synced"), whole=False)
            for answer in answers:
                self._check(answer, found)

    def _acknowledge(self, answer: Answer) -> None:
        """Notes what an answer promises, before it is looked for."""
        waiting = self.open.get(getattr(answer, "id", ""))
        self.bench.done.answers += 1
        if isinstance(waiting, Order) and isinstance(answer, UpdateProgress):
            self.promises.progress(waiting, answer)
        elif isinstance(waiting, Order) and isinstance(answer, Updated):
            self.promises.updated(waiting, answer)
            self.bench.done.acknowledged += 1
        elif isinstance(waiting, Removal):
            self.promises.removed(waiting, answer)

    def _check(self, answer: Answer, found: dict[str, Told]) -> None:
        request = getattr(answer, "id", "")
        waiting = self.open.get(request)
        if isinstance(waiting, Reading):
            self._check_reading(waiting, answer)
        if isinstance(waiting, Order) and isinstance(answer, Updated):
            told = found[waiting.tenant]
            at = [told.index(text) for text in waiting.texts if text in told]
            if len(at) < len(waiting.texts):
                raise Violation(f"{waiting} was acknowledged and is not whole: {told}")
        if isinstance(answer, Failed):
            self._check_failure(waiting, answer, found)
        if isinstance(answer, Updated | Failed | Reply | Finished | Scored):
            self.open.pop(request, None)
            if isinstance(waiting, Order):
                waiting.open = False

    def _check_failure(
        self, waiting: Order | Removal | Reading | None, answer: Failed, found: dict[str, Told]
    ) -> None:
        if isinstance(waiting, Order) and answer.code == "idempotency_conflict":
            told = found[waiting.tenant]
            others = [o for o in self.orders if o.key == waiting.key and o is not waiting]
            if not any(text in told for other in others for text in other.texts):
                raise Violation(f"{waiting} conflicts with nothing")
        elif answer.code == "version_not_kept" and isinstance(waiting, Removal):
            return
        elif answer.code not in self.told:
            raise Violation(f"{answer.code}, {answer.message}")

    def _check_reading(self, reading: Reading, answer: Answer) -> None:
        if isinstance(answer, Tokens):
            reading.tokens += answer.tokens
        if not isinstance(answer, Scored | Finished):
            return
        tenant, version = reading.tenant, answer.memory_version
        cut = self.promises.doubts[tenant] or self._removals(tenant)
        states = self.seen[tenant][reading.since :]
        if version < reading.least and not cut and all(len(told) >= reading.least for told in states):
            raise Violation(f"{tenant} is read at {version}, not {reading.least}")
        durable = {told[:version] for told in states if len(told) >= version}
        for told in durable:
            if isinstance(answer, Finished):
                if reading.tokens == self.oracle.tokens(tenant, told):
                    return
            elif _close(answer.logprobs, self.oracle.scores(tenant, told)):
                return
        raise Violation(f"{tenant} at {version} reads as none of {sorted(durable)}")

    # ------------------------------------------------------------ what is durable

    def _look(self, disk: MemoryDisk, *, whole: bool) -> dict[str, Told]:
        """What a start on ``disk`` finds; ``whole``: the blobs too. Raises Violation."""
        store = self.store
        # who looks here is no client: a tenant's first reader syncs what a killed server may have left
        armed = self.disk.before, self.disk.after
        self.disk.before = self.disk.after = lambda call, path: None
        if disk is not self.disk:
            root = self.bench.new_root()
            root.mkdir()
            store = DiskStore(root, files=MemoryDisk(root, disk.folder), patience=PATIENCE)
        try:
            found = {tenant: self._told(store, tenant) for tenant in TENANTS}
            for tenant, told in found.items():
                self.promises.compare(tenant, told)
                if told != self.seen[tenant][-1]:
                    self.seen[tenant].append(told)
                if whole:
                    self.promises.compare_blobs(store, tenant, told)
        finally:
            if store is not self.store:
                store.close()
            self.disk.before, self.disk.after = armed
        return found

    def _told(self, store: DiskStore, tenant: str) -> Told:
        if store.load(tenant) is None:
            return ()
        return tuple(record.text or "" for record in store.history(tenant))


def _close(one: list[float], other: list[float]) -> bool:
    return len(one) == len(other) and all(abs(a - b) < 1e-3 for a, b in zip(one, other, strict=True))
