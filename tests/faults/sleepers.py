"""Two real servers on one Redis, of which one is stopped in its sleep (SIGSTOP) until the other has its tenant.

When it wakes, what it had under way must not be written over the other's updates, and it must not answer from what it
remembers.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from app.store.url import open_store
from tests.faults.kills import MODEL, SETTINGS, TRANSPORT, history, reads, send
from tests.faults.ledger import Ledger, Violation
from tests.faults.servers import Caller, ForkedServer, Zygote
from tests.faults.shadow import Shadow

LEASE = 0.5
_TENANT_EVERY = 20
_PATIENCE = 30.0


@dataclass
class Naps:
    """``caught`` updates were under way when their server was stopped; ``late`` were answered after it woke."""

    cycles: int = 0
    updates: int = 0
    caught: int = 0
    late: int = 0
    reads: int = 0


class Sleepers:
    """``url`` is a Redis server's, without options."""

    def __init__(self, url: str, zygote: Zygote, seed: int) -> None:
        self._url = f"{url}?lease={LEASE}"
        self._rng = random.Random(seed)
        self._seed = seed
        self._shadow = Shadow(MODEL)
        self.done = Naps()
        self._servers: list[ForkedServer] = []
        try:
            for _ in range(2):
                self._servers.append(ForkedServer(zygote, **SETTINGS, store=self._url))
                self._servers[-1].ready()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for server in self._servers:
            server.close()

    def run(self, cycles: int, told: Callable[[Naps], None]) -> None:
        """Raises Violation."""
        ledger = Ledger("")
        for cycle in range(cycles):
            if cycle % _TENANT_EVERY == 0:
                self._check_pool(ledger)
                ledger = Ledger(f"s{self._seed}-{cycle}")
            self._nap(ledger, *self._rng.sample(self._servers, 2))
            self.done.cycles += 1
            told(self.done)
        self._check_pool(ledger)

    # ------------------------------------------------------------ one sleep

    def _nap(self, ledger: Ledger, sleeper: ForkedServer, other: ForkedServer) -> None:
        asleep, awake = Caller(sleeper.address), Caller(other.address)
        self._update(asleep, ledger)
        under_way = threading.Thread(target=self._one, args=(sleeper, ledger))
        under_way.start()
        time.sleep(self._rng.uniform(0.0, 0.03))
        worker = sleeper.worker()
        os.kill(worker, signal.SIGSTOP)
        try:
            self.done.caught += bool(ledger.open)
            self._update(awake, ledger)
            # asked of the one that sleeps, after the other has acknowledged: it knows nothing of that yet
            least = ledger.highest
            answers: list[int] = []
            reading = threading.Thread(target=lambda: answers.append(self._read(sleeper, ledger.tenant)))
            reading.start()
            time.sleep(self._rng.uniform(0.0, 0.05))
            before = len(ledger.acknowledged)
        finally:
            os.kill(worker, signal.SIGCONT)
        for thread in (reading, under_way):
            thread.join(_PATIENCE)
            assert not thread.is_alive(), "a server that woke does not answer"
        self.done.late += len(ledger.acknowledged) - before
        if not answers or answers[0] < least:
            raise Violation(f"a server that woke reads {answers}, after {least} was acknowledged elsewhere")
        self._update(asleep, ledger)
        for caller in (awake, asleep):
            self._settle(caller, ledger)
            caller.close()

    def _one(self, server: ForkedServer, ledger: Ledger) -> None:
        caller = Caller(server.address)
        try:
            self.done.updates += send(caller, ledger, ledger.begin())[1]
        except TRANSPORT:
            return
        finally:
            caller.close()

    def _update(self, caller: Caller, ledger: Ledger) -> None:
        """One update that is acknowledged, under a number of its own or, while the other has the tenant, another."""
        end = time.monotonic() + _PATIENCE
        while not send(caller, ledger, ledger.begin())[1]:
            if time.monotonic() > end:
                raise Violation("no server takes an update")
        self.done.updates += 1

    def _read(self, server: ForkedServer, tenant: str) -> int:
        """The version that a generation reads."""
        caller = Caller(server.address)
        end = time.monotonic() + _PATIENCE
        try:
            while time.monotonic() < end:
                _, version = reads(caller, tenant, [5, 6, 7, 8])
                if version is not None:
                    self.done.reads += 1
                    return version
            return -1
        finally:
            caller.close()

    # ------------------------------------------------------------ looking

    def _settle(self, caller: Caller, ledger: Ledger) -> None:
        """The history; then what had no answer once more, and the history again."""
        history(caller, ledger)
        end = time.monotonic() + _PATIENCE
        for number in sorted(ledger.open):
            while not send(caller, ledger, number)[1]:
                if time.monotonic() > end:
                    raise Violation("an update is not taken a second time")
        history(caller, ledger)

    def _check_pool(self, ledger: Ledger) -> None:
        if not ledger.parts:
            return
        store = open_store(self._url)
        try:
            self._shadow.check(store, ledger)
        finally:
            store.close()
