"""``kill -9`` of a real server under load, again and again; what it has acknowledged is looked for each time.

A cycle: start, compare every tenant's history with the ledger over HTTP, ask again by their keys for what had no
answer, then load from several threads until the kill. At intervals the store is opened without a server, and the
pools are compared with the same updates computed anew.
"""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.store.home import tenant_id
from app.store.url import open_store
from tests.faults.ledger import Ledger, Violation, key_of, tokens_of
from tests.faults.servers import Caller, ForkedServer, Server, StartedServer, Zygote
from tests.faults.shadow import Shadow
from tests.harness import CHECKPOINTS

MODEL = "two-adapters"
_TENANTS = 12
_UPDATERS = 4
_READERS = 1
# few enough that memories come and go: six pools on the device, six beside
SETTINGS = {"model": str(CHECKPOINTS / MODEL), "resident_bytes": 300_000, "warm_bytes": 300_000}
# a killed server's lease stands for a while yet
_MAYBE_LATER = {"worker_unavailable", "tenant_elsewhere", "version_conflict"}
TRANSPORT = (OSError, http.client.HTTPException)
_EPOCH = 40
_DEEP = 10


@dataclass
class Kills:
    """What was done so far; ``by`` counts cycles by what was killed, ``cold`` servers that were not forked."""

    cycles: int = 0
    by: dict[str, int] = field(default_factory=dict)
    cold: int = 0
    aimed: int = 0
    updates: int = 0
    unanswered: int = 0
    found: int = 0
    again: int = 0
    generations: int = 0
    pools: int = 0


class Bench:
    """One store, its servers one after another, and the ledgers of its tenants."""

    def __init__(self, url: str, directory: Path | None, zygote: Zygote, seed: int, **settings: Any) -> None:
        """``directory`` is a disk store's, where the kills can be aimed."""
        self.url, self._directory, self._zygote = url, directory, zygote
        self._settings = {**SETTINGS, **settings, "store": url}
        self._rng = random.Random(seed)
        self._seed = seed
        self._shadow = Shadow(MODEL)
        self.done = Kills()
        self.ledgers: list[Ledger] = []
        self._server: Server | None = None
        self._only_worker = 0

    def run(self, cycles: int, told: Callable[[Kills], None], *, cold_every: int = 0) -> None:
        """Raises Violation."""
        try:
            for cycle in range(cycles):
                if cycle % _EPOCH == 0:
                    self._next_tenants(cycle // _EPOCH)
                self._start(cold=bool(cold_every) and cycle % cold_every == cold_every - 1)
                self._settle()
                if cycle % _DEEP == _DEEP - 1 or cycle % _EPOCH == _EPOCH - 1:
                    self._compare()
                    self._start(cold=False)
                self._load_and_kill()
                self.done.cycles += 1
                told(self.done)
            self._start(cold=False)
            self._settle()
            self._compare()
        finally:
            self._end()

    # ------------------------------------------------------------ servers

    def _start(self, *, cold: bool) -> None:
        if self._server is not None:
            if not cold:
                self._server.ready()
                return
            self._end()
        if cold:
            self._server = StartedServer(**self._settings)
            self.done.cold += 1
        else:
            self._server = ForkedServer(self._zygote, **self._settings)
        self._server.ready()

    def _end(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    def _caller(self) -> Caller:
        assert self._server is not None
        return Caller(self._server.address)

    # ------------------------------------------------------------ load

    def _next_tenants(self, epoch: int) -> None:
        if self._server is not None:
            self._server.ready()
            self._settle()
            self._compare()
        names = [f"t{self._seed}-{epoch}-{number}" for number in range(_TENANTS)]
        self.ledgers = [Ledger(name) for name in names]

    def _load_and_kill(self) -> None:
        assert self._server is not None
        failed: list[BaseException] = []
        stop = threading.Event()
        works = [self._update] * _UPDATERS + [self._generate] * _READERS
        threads = [
            threading.Thread(target=self._work, args=(work, self._rng.random(), stop, failed))
            for work in works
        ]
        for thread in threads:
            thread.start()
        aimed = self._directory is not None and self._rng.random() < 0.5
        if aimed:
            self._until_commit()
            self.done.aimed += 1
        else:
            time.sleep(self._rng.uniform(0.0, 0.3))
        # the supervisor waits longer and longer for a worker that dies again and again
        kinds = ["API", "both"] if self._only_worker >= 2 else ["API", "both", "worker"]
        kind = self._rng.choice(kinds)
        {"API": self._server.kill, "both": self._server.kill_both, "worker": self._server.kill_worker}[kind]()
        stop.set()
        self.done.by[kind] = self.done.by.get(kind, 0) + 1
        self._only_worker = self._only_worker + 1 if kind == "worker" else 0
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        if kind != "worker":
            self._end()
        if failed:
            raise failed[0]

    def _until_commit(self) -> None:
        """Until a file of a change appears that was not there, or is filled; then up to two milliseconds more."""
        assert self._directory is not None
        ledger = self._rng.choice(self.ledgers)
        name = tenant_id(ledger.tenant)
        directory = self._directory / "tenants" / name[:2] / name
        end = time.monotonic() + 0.5
        time.sleep(self._rng.uniform(0.0, 0.1))
        before: set[tuple[str, int]] | None = None
        while time.monotonic() < end:
            try:
                now = {(path.name, path.stat().st_size) for path in directory.iterdir()}
            except OSError:
                now = set()
            if before is not None and now - before:
                time.sleep(self._rng.choice((0.0, self._rng.uniform(0.0, 0.002))))
                return
            before = now
            time.sleep(0.0002)

    def _work(
        self,
        work: Callable[[Caller, random.Random], bool],
        seed: float,
        stop: threading.Event,
        failed: list[BaseException],
    ) -> None:
        caller, rng = self._caller(), random.Random(seed)
        try:
            while not stop.is_set() and work(caller, rng):
                pass
        except TRANSPORT:
            return
        except BaseException as error:
            failed.append(error)
        finally:
            caller.close()

    def _update(self, caller: Caller, rng: random.Random) -> bool:
        ledger = rng.choice(self.ledgers)
        goes_on, taken = send(caller, ledger, ledger.begin())
        self.done.updates += taken
        return goes_on

    def _generate(self, caller: Caller, rng: random.Random) -> bool:
        ledger = rng.choice(self.ledgers)
        least = ledger.highest
        goes_on, version = reads(caller, ledger.tenant, [3 + rng.randrange(300) for _ in range(6)])
        if version is not None:
            if version < least:
                raise Violation(f"{ledger.tenant} reads {version} after {least} was acknowledged")
            self.done.generations += 1
        return goes_on

    # ------------------------------------------------------------ looking

    def _settle(self) -> None:
        """Every tenant's history against the ledger; then what had no answer once more, and the history again."""
        caller = self._caller()
        try:
            for ledger in self.ledgers:
                waiting = set(ledger.open)
                before = dict(ledger.acknowledged)
                history(caller, ledger)
                there = {part.number for part in ledger.parts[-200:]}
                self.done.unanswered += len(waiting)
                self.done.found += len(waiting & there)
                keyed = [number for number in before if key_of(ledger.tenant, number) is not None]
                self._ask_again(caller, ledger, sorted(ledger.open), {n: before[n] for n in keyed[-1:]})
        finally:
            caller.close()

    def _ask_again(
        self, caller: Caller, ledger: Ledger, unanswered: list[int], answered: dict[int, int]
    ) -> None:
        for number in [*unanswered, *answered]:
            end = time.monotonic() + 30.0
            while number in ledger.open or number in answered:
                if send(caller, ledger, number)[1]:
                    self.done.updates += number not in answered
                    break
                assert time.monotonic() < end, "the server does not take an update"
                time.sleep(0.02)
            version = ledger.acknowledged[number]
            if answered.get(number, version) != version:
                raise Violation(
                    f"{ledger.tenant}: asked again, {number} is {version}, not {answered[number]}"
                )
            self.done.again += 1
        if unanswered or answered:
            history(caller, ledger)

    def _compare(self) -> None:
        """Without a server: the pools in the store against the same updates computed anew."""
        self._end()
        store = open_store(self.url)
        try:
            for ledger in self.ledgers:
                self._shadow.check(store, ledger)
                self.done.pools += 1
        finally:
            store.close()


# ---------------------------------------------------------------- requests


def send(caller: Caller, ledger: Ledger, number: int) -> tuple[bool, bool]:
    """One update: whether the server goes on, and whether it has acknowledged it. Raises Violation, ``TRANSPORT``."""
    body: dict[str, Any] = {"tenant": ledger.tenant, "text": tokens_of(ledger.tenant, number)}
    key = key_of(ledger.tenant, number)
    if key is not None:
        body["idempotency_key"] = key
    status, data = caller.ask("POST", "/update", body)
    answer = json.loads(data)
    if status == 200:
        ledger.answered(number, answer["memory_version"])
        return True, True
    if status == 429:
        ledger.refused(number)
    return _goes_on(status, answer), False


def reads(caller: Caller, tenant: str, prompt: list[int]) -> tuple[bool, int | None]:
    """A generation: whether the server goes on, and the version that was read. Raises Violation, ``TRANSPORT``."""
    body = {"tenant": tenant, "prompt": prompt, "max_tokens": 4, "ignore_eos": True}
    status, data = caller.ask("POST", "/generate", body)
    answer = json.loads(data)
    if status == 200:
        return True, answer["memory_version"]
    return _goes_on(status, answer), None


def _goes_on(status: int, answer: dict[str, Any]) -> bool:
    code = answer["error"]["code"]
    if status != 429 and code not in _MAYBE_LATER:
        raise Violation(f"a request was answered {status}: {answer}")
    time.sleep(0.02)
    return bool(code != "worker_unavailable")


def history(caller: Caller, ledger: Ledger) -> None:
    """The tenant's history and memory against the ledger. Raises Violation."""
    path = f"/tenants/{ledger.tenant}"
    known = len(ledger.parts)
    status, body = caller.get(f"{path}/history?limit=1000")
    if status == 404:
        ledger.settle([], 0)
        return
    if status != 200:
        raise Violation(f"{ledger.tenant}: a history was answered {status}: {body}")
    entries = [entry for entry in reversed(body["updates"]) if entry["memory_version"] > known]
    ledger.settle(entries, body["memory_version"])
    status, body = caller.get(f"{path}/memory")
    if status != 200 or body["memory_version"] != len(ledger.parts):
        raise Violation(f"{ledger.tenant}: the memory is not at {len(ledger.parts)}: {body}")
