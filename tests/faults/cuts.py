"""Random scripts on the Redis store while its connections break at any byte, stall, and its server is killed.

After every fault the store, or a new one after a crash of the server that had it, is compared with the model: the
operation that was hit was done wholly or not at all, and all that was acknowledged is there.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from app.errors import ServiceError, StoreFailed, TenantElsewhere, VersionConflict
from app.store.redis import RedisStore
from app.store.redis_server import parse_url
from tests.faults.ledger import Violation
from tests.faults.model import Memories, Step, observe
from tests.faults.proxy import Direction, Proxy
from tests.faults.scripts import script
from tests.store.redisserver import RedisServer

_STEPS = 12
_LEASE = 0.5
_PATIENCE = 20.0

_T = TypeVar("_T")


@dataclass
class Cuts:
    """``cycles`` are faults that came about; ``by`` counts them by kind; ``done`` operations that were hit and had
    been carried out all the same, ``crashes`` stores that were left as by a kill."""

    cycles: int = 0
    by: dict[str, int] = field(default_factory=dict)
    operations: int = 0
    failed: int = 0
    done: int = 0
    crashes: int = 0


class Cutting:
    """A Redis server in ``folder`` behind a proxy, and the store that works through it and waits ``timeout`` seconds
    for an answer. ``kills`` and ``stalls`` are their shares of all faults."""

    def __init__(
        self, folder: Path, seed: int, *, kills: float = 0.1, stalls: float = 0.04, timeout: float = 1.0
    ) -> None:
        self._rng = random.Random(seed)
        self._kills, self._stalls, self._timeout = kills, stalls, timeout
        self._server = RedisServer(folder)
        self._proxy = Proxy(self._server.port)
        self._sizes: dict[tuple[str, Direction], int] = {}
        self._prefix = "p"
        self._store: RedisStore | None = None
        self._killer = threading.Timer(0.0, self._server.kill)
        self.found = Cuts()

    def close(self) -> None:
        if self._store is not None:
            self._abandon()
        self._proxy.close()
        self._server.kill()

    def run(self, cycles: int, told: Callable[[Cuts], None]) -> None:
        """Raises Violation."""
        number = 0
        while self.found.cycles < cycles:
            number += 1
            self._prefix = f"s{number}"
            self._open()
            memories: Memories = {}
            for step in script(self._rng.getrandbits(32), _STEPS):
                memories = self._step(step, memories)
                told(self.found)
                if self.found.cycles >= cycles:
                    break
            self._compare([memories], f"script {number} at its end")
            assert self._store is not None
            self._store.close()
            self._store = None
            with self._server.client() as client:
                client.flushall()

    # ------------------------------------------------------------ the store

    def _open(self) -> None:
        options = f"prefix={self._prefix}&lease={_LEASE}&timeout={self._timeout}"
        url = f"redis://127.0.0.1:{self._proxy.port}/0?{options}"
        self._store = self._patiently(lambda: RedisStore(parse_url(url)))

    def _abandon(self) -> None:
        """As if the process had been killed: leases stay until they lapse."""
        assert self._store is not None
        leases = self._store._redis_manifests.leases
        leases._stop.set()
        leases._thread.join()
        self._store._server.close()
        self._store = None

    def _patiently(self, work: Callable[[], _T]) -> _T:
        """``work``, again while another server's lease stands or the connections of before turn out to be broken."""
        end = time.monotonic() + _PATIENCE
        while True:
            try:
                return work()
            except (TenantElsewhere, VersionConflict, StoreFailed) as error:
                if time.monotonic() > end:
                    raise Violation(f"the store does not come back: {error}") from error
                time.sleep(0.02)
            except ServiceError as error:
                raise Violation(f"the store cannot be read: {error}") from error

    # ------------------------------------------------------------ one fault

    def _step(self, step: Step, memories: Memories) -> Memories:
        """Carries the step out, however often it is hit; gives the model after it."""
        after = step.on_model(memories)
        for _ in range(50):
            memories_now = self._once(step, memories, after)
            if memories_now is after:
                return after
        raise Violation(f"{step!r} cannot be carried out")

    def _once(self, step: Step, memories: Memories, after: Memories) -> Memories:
        kind = self._begin(step)
        failed: ServiceError | None = None
        before = dict(self._proxy.passed)
        assert self._store is not None
        self.found.operations += 1
        try:
            step.on_store(self._store, memories)
        except ServiceError as error:
            failed = error
        except AssertionError as error:
            raise Violation(f"{step!r}: {error}") from error
        fired = self._end(kind)
        if not fired:
            for direction in ("request", "reply"):
                self._sizes[step.does, direction] = self._proxy.passed[direction] - before[direction]
            if failed is None:
                return after
        else:
            self.found.cycles += 1
            self.found.by[kind] = self.found.by.get(kind, 0) + 1
        if self._rng.random() < 0.1:
            self._abandon()
            self.found.crashes += 1
            self._open()
        what = f"{step!r} hit by {kind or 'nothing'}"
        if failed is None:
            self._compare([after], what)
            return after
        self.found.failed += 1
        # who failed claims anew before anything else, which fences off what may still be on its way
        self._claim(step)
        found = self._compare([memories, after], what)
        if found is after and after != memories:
            self.found.done += 1
        # what is late now must come to nothing
        self._proxy.settle()
        self._compare([found], f"{what}, later")
        return found

    def _claim(self, step: Step) -> None:
        assert self._store is not None
        store = self._store
        for tenant in filter(None, (step.tenant, step.target)):
            self._patiently(lambda tenant=tenant: store.claim(tenant))  # type: ignore[misc]

    def _begin(self, step: Step) -> str:
        """Prepares a fault; its kind."""
        draw = self._rng.random()
        if draw < 0.05:
            return ""
        if draw < 0.05 + self._kills:
            delay = self._rng.uniform(0.0, 0.004)
            self._killer = threading.Timer(delay, self._server.kill)
            self._killer.start()
            return "kill"
        direction: Direction = self._rng.choice(("request", "reply"))
        after = self._rng.randrange(max(1, self._sizes.get((step.does, direction), 400)))
        stall = 1.2 * self._timeout if draw < 0.05 + self._kills + self._stalls else 0.0
        self._proxy.arm(direction, after, stall)
        return f"{direction} {'stalled' if stall else 'cut'}"

    def _end(self, kind: str) -> bool:
        """Whether the fault came about."""
        if kind == "kill":
            self._killer.join()
            self._server.start()
            return True
        fired = self._proxy.fired
        self._proxy.disarm()
        return fired

    def _compare(self, allowed: list[Memories], what: str) -> Memories:
        """The one of ``allowed`` that the store shows. Raises Violation."""
        assert self._store is not None
        store = self._store
        try:
            found = self._patiently(lambda: observe(store))
        except AssertionError as error:
            raise Violation(f"{what}: {error}") from error
        for memories in allowed:
            if found == memories:
                return memories
        raise Violation(f"{what}: found {found}, allowed {allowed}")
