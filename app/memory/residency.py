"""Which tenants are resident, warm or cold, and who makes room for whom.

Memory is written through to the store, so that leaving the device saves nothing. Loading happens in background
threads while other tenants' steps run; all decisions are made in the worker's loop, which alone calls the
public methods.

A memory that was brought for a request stays until that request has begun, so that two tenants cannot take a
slot from each other in turns and both get nowhere. What comes after that is the scheduler's: its preference for
residents is bounded, and with it the stay of a tenant that always has more to do.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from app.errors import ServiceError
from app.memory.arena import Arena, Memory
from app.memory.lanes import Lanes, Mark
from app.memory.loader import Leaving, Loaded, Loader
from app.memory.source import Source
from app.memory.traffic import Traffic
from app.memory.warm import Warm, WarmTier
from app.model.backbone import Backbone
from app.store.base import ClaimMark, Manifest, Store, content

Submit = Callable[[Callable[[], object], Callable[[object, ServiceError | None], None]], None]
"""Runs the first function in a background thread, then hands result and error to the second in the loop."""

MOST_LOADS = 3
"""Loads under way at once: enough to keep disk and link busy, fewer than there are threads, for commits."""


@dataclass(frozen=True, eq=False)
class Born:
    """``born`` int32 [L or 1, N]: the version that wrote each token of the memory that ``content`` names."""

    content: tuple[float, int, int]
    born: Tensor


@dataclass(frozen=True)
class Erasure:
    """``tiers`` that the memory was found in. ``wipe`` is for a background thread, ``give_back`` for the loop."""

    tiers: list[str]
    wipe: Callable[[], None]
    give_back: Callable[[], None]


class Residency(Source):
    """Loads, evicts and looks up tenants' memories.

    ``waiting`` tells whether a tenant has requests that wait; ``settled`` of one whose claim, load or copy has ended,
    for whom nobody may be waiting any more; ``brought`` of a tenant whose memory was brought, and the bytes that moved
    for it; ``sent`` counts what went to background threads.
    """

    def __init__(
        self,
        backbone: Backbone,
        arena: Arena,
        store: Store,
        fingerprint: str,
        warm_bytes: int,
        submit: Submit,
        lanes: Lanes,
    ) -> None:
        super().__init__(backbone, store, fingerprint)
        self.backbone, self.arena = backbone, arena
        self.waiting: Callable[[str], bool] = lambda _: False
        self.settled: Callable[[str], None] = lambda _: None
        self.brought: Callable[[str, int], None] = lambda tenant, moved: None
        self.failures: dict[str, ServiceError] = {}
        self.traffic = Traffic()
        self.sent = 0
        self._submit, self._lanes = submit, lanes
        self._loader = Loader(arena, self, lanes)
        self.warm = WarmTier(warm_bytes, self._loader.bytes_per_copy, self._loader.buffers)
        self._resident: dict[str, Memory] = {}
        self._loading: set[str] = set()
        self._heating: set[str] = set()
        self._claiming: set[str] = set()
        self._leaving: dict[str, Leaving] = {}
        self._stale: set[str] = set()
        # the claim under which a memory here was the newest
        self._claims: dict[str, ClaimMark | None] = {}

    # ------------------------------------------------------------ looking

    def get(self, tenant: str) -> Memory | None:
        return self._resident.get(tenant)

    def born(self, tenant: str) -> Born | None:
        """What is known of the memory on the device or warm; it need not be the newest."""
        here = self._resident.get(tenant) or self.warm.get(tenant)
        return None if here is None else Born(here.content, here.born)

    def created(self) -> dict[str, float]:
        """The tenants whose memories are on the device or warm, and when these tenants were made (Unix time)."""
        warm = {tenant: copy.content[0] for tenant, copy in self.warm.items()}
        return warm | {tenant: memory.created for tenant, memory in self._resident.items()}

    def tier(self, tenant: str) -> str:
        """Where the memory lies; one that is on its way out is warm if it is being kept, one on its way in not yet
        resident."""
        if tenant in self._resident:
            return "resident"
        return "warm" if tenant in self.warm or tenant in self._leaving else "cold"

    def resident(self, tenant: str) -> bool:
        """Whether an update can begin in the next step: the newest version is here, and no other server makes one."""
        return tenant in self._resident and tenant not in self._stale and self._ours(tenant)

    def _ours(self, tenant: str) -> bool:
        """Whether nobody else can have changed the tenant since its memory came, whatever took a claim meanwhile."""
        mark = self.store.claimed(tenant)
        return mark is not None and mark == self._claims.get(tenant)

    def readable(self, tenant: str) -> bool:
        """Whether a generation can begin in the next step."""
        return self.resident(tenant) and self.arena.readable(self._resident[tenant])

    def moving(self, tenant: str) -> bool:
        """Whether a background thread is at work on the tenant's memory."""
        at_work = (self._loading, self._heating, self._claiming, self._leaving)
        return any(tenant in tenants for tenants in at_work)

    def outdated(self, tenant: str) -> bool:
        """Whether the stored memory is another now, and comes when those have ended who read the one here."""
        memory = self._resident.get(tenant)
        return memory is not None and tenant in self._stale and memory.pins > 0

    @property
    def counts(self) -> dict[str, int]:
        return {"resident": len(self._resident), "warm": len(self.warm), "loading": len(self._loading)}

    @property
    def bytes(self) -> dict[str, int]:
        """Bytes in use by tier; ``hot`` are the rotated copies."""
        each, copy = Arena.bytes_per_pool(self.backbone), Arena.bytes_per_copy(self.backbone)
        return {
            "resident": len(self._resident) * each,
            "hot": self.arena.hot_used * copy,
            "warm": self.warm.bytes,
        }

    @property
    def busy(self) -> bool:
        """Whether no further load may begin now."""
        return len(self._loading) >= MOST_LOADS

    # ------------------------------------------------------------ coming

    def prepare(self, tenant: str, *, read: bool, ahead: bool = False) -> bool:
        """Begins what ``tenant`` still needs: loading, and for a ``read`` a rotated copy.

        False if there is no room now because others hold all of it; the caller tries again at a later step.
        ``ahead`` of the plan, nobody whose requests wait makes room. A failure lands in ``failures``.
        """
        if self.moving(tenant):
            return True
        memory = self._resident.get(tenant)
        if memory is not None and tenant in self._stale:
            if self.outdated(tenant):
                return False
            self.forget(tenant)
            memory = None
        if memory is None:
            return self._load(tenant, ahead)
        if not self._ours(tenant):
            return self._claim(tenant)
        if read and not self.arena.readable(memory):
            return self._heat(memory)
        return True

    def prepare_ahead(self, memory: Memory) -> None:
        """Begins the rotated copy of a version just published, if it takes nobody's place: a memory that was read
        before its update is likely read behind it."""
        if self.arena.copies_free and self.resident(memory.tenant) and not self.moving(memory.tenant):
            self._heat(memory, owed=False)

    def _claim(self, tenant: str) -> bool:
        """Takes a tenant back that another server may have had: its memory here may be an old one."""
        self._claiming.add(tenant)

        def done(result: object, error: ServiceError | None) -> None:
            self._claiming.discard(tenant)
            memory = self._resident.get(tenant)
            if error is not None:
                self.failures[tenant] = error
            elif memory is not None:
                assert isinstance(result, tuple)
                self._claims[tenant], manifest = result
                if manifest is None or content(manifest) != memory.content:
                    self.renew(tenant)
            self.settled(tenant)

        def work() -> tuple[ClaimMark | None, Manifest | None]:
            mark = self._mark(tenant)
            # asked after the mark was seen: as long as it stands this is the newest
            return mark, self.store.claim(tenant)

        self.sent += 1
        self._submit(work, done)
        return True

    def _mark(self, tenant: str) -> ClaimMark | None:
        """Claims the tenant; what is read of it from here on is the newest while the mark stands. Any thread."""
        self.store.claim(tenant)
        return self.store.claimed(tenant)

    def owed(self, tenant: str) -> bool:
        """Whether the memory is here for a request that has not begun."""
        memory = self._resident.get(tenant)
        return memory is not None and memory.owed

    def begun(self, memory: Memory) -> None:
        """A request that the memory was brought for begins."""
        memory.owed = False
        self.arena.touch(memory)

    def _kept(self, memory: Memory) -> bool:
        return memory.owed and self.waiting(memory.tenant)

    def _heat(self, memory: Memory, *, owed: bool = True) -> bool:
        hot = self.arena.take_hot(self._kept)
        if hot is None:
            return False
        view, after = memory.view, self._lanes.mark()
        self._heating.add(memory.tenant)
        memory.pins += 1
        memory.owed = memory.owed or owed

        def work() -> None:
            with self._lanes.apart(after):
                self.arena.build_hot(memory.slot, view.rank, hot)

        def done(_: object, error: ServiceError | None) -> None:
            self._heating.discard(memory.tenant)
            memory.pins -= 1
            if error is None:
                self.arena.settle_hot(memory, view, hot)
            else:
                # what is in it may still be another's
                self.arena.give_hot(hot)
                if memory.owed:
                    self.failures[memory.tenant] = error
            self.settled(memory.tenant)

        self.sent += 1
        self._submit(work, done)
        return True

    def _load(self, tenant: str, ahead: bool) -> bool:
        if self.busy:
            return False
        slot, victim, leaving = self.arena.take_slot(), None, None
        if slot is None:
            victim = self._victim()
            if victim is None or (ahead and self.waiting(victim.tenant)):
                return False
        # first: the copy of the one that leaves would take its place
        warm = self.warm.hold(tenant)
        if victim is not None:
            leaving = self._leave(victim)
            slot = self.arena.take_slot()
        assert slot is not None
        place, after, sent = slot, self._lanes.mark(), time.monotonic()
        self._loading.add(tenant)
        # what was distrusted is read anew now
        self._stale.discard(tenant)

        def done(result: object, error: ServiceError | None) -> None:
            self._loading.discard(tenant)
            self.warm.let_go(tenant)
            if leaving is not None:
                self._left(leaving, kept=error is None)
            if error is not None:
                self.arena.give_slot(place)
                self.failures[tenant] = error
            else:
                assert isinstance(result, tuple)
                self._claims[tenant], loaded = result
                assert isinstance(loaded, Loaded)
                memory = loaded.memory
                memory.owed = True
                self._resident[tenant] = memory
                self.arena.settle(memory)
                self.arena.touch(memory)
                self.traffic.loaded(loaded.tier, time.monotonic() - sent, loaded.moved)
                self.brought(tenant, loaded.moved)
            self.settled(tenant)

        def work() -> tuple[ClaimMark | None, Loaded]:
            return self._mark(tenant), self._loader.load(tenant, place, after, warm, leaving)

        self.sent += 1
        self._submit(work, done)
        return True

    # ------------------------------------------------------------ blocks for the store

    def issued(self) -> Mark:
        """All that the device was given so far, for ``fetch``."""
        return self._lanes.mark()

    def fetch(self, block: Tensor, after: Mark) -> Tensor:
        """A block that was whole at ``after``, on the host: copied beside the steps that go on. For background
        threads; whoever calls keeps the block until it returns."""
        with self._lanes.apart(after):
            return block.cpu()

    # ------------------------------------------------------------ going

    def _victim(self) -> Memory | None:
        """Who makes room: nobody who is held or owed; best one without use, then one that no request waits for,
        then the least recently used."""
        idle = [m for m in self._resident.values() if m.pins == 0 and not self._kept(m)]
        return min(
            idle, key=lambda m: (m.tenant not in self._stale, self.waiting(m.tenant), m.used), default=None
        )

    def _leave(self, memory: Memory) -> Leaving | None:
        """Takes the memory out of its slot; returns what is to be copied out first, if anything."""
        tenant = memory.tenant
        del self._resident[tenant]
        self._claims.pop(tenant, None)
        self.arena.evict(memory)
        self.traffic.evictions += 1
        if tenant in self._stale:
            self._stale.discard(tenant)
            return None
        here = self.warm.get(tenant)
        if here is not None and here.content == memory.content:
            return None
        self.warm.drop(tenant)
        # version 0 is the checkpoint's own pool, which lies in host memory anyway
        seat = self.warm.seat(self._resident.__contains__) if memory.version else None
        if seat is None:
            return None
        leaving = self._leaving[tenant] = Leaving(memory, seat)
        return leaving

    def _left(self, leaving: Leaving, *, kept: bool) -> None:
        """The copy is made, if there was room; it is kept unless somebody has renewed the memory meanwhile."""
        memory = leaving.memory
        if self._leaving.get(memory.tenant) is leaving:
            del self._leaving[memory.tenant]
        else:
            kept = False
        if leaving.seat.lacking is not None:
            self.warm.lose(leaving.seat)
            return
        self.traffic.moved["out"] += self.warm.each
        if kept:
            self.warm.put(
                memory.tenant,
                Warm(memory.content, memory.view.rank, memory.born, leaving.seat),
            )
        else:
            self.warm.give(leaving.seat)

    def distrust(self, tenant: str) -> None:
        """Has the memory read again from the store before anything new uses it: a commit's outcome is unknown."""
        self._stale.add(tenant)

    def renew(self, tenant: str) -> None:
        """The stored memory is another now: nothing new reads the one that is here, warm or on its way.

        Those who read it go on.
        """
        if tenant in self._resident or tenant in self._loading:
            self.distrust(tenant)
        self._leaving.pop(tenant, None)
        self.warm.drop(tenant)

    def erase(self, tenant: str) -> Erasure:
        """Forgets an erased tenant; what is free of slots and copies is out of use until it is wiped and given back.

        All of it, because nobody knows in which of them the tenant has ever been.
        """
        tiers = [tier for tier, here in (("resident", self._resident), ("warm", self.warm)) if tenant in here]
        self.forget(tenant)
        slots, copies = self.arena.take_used()
        seats, after = self.warm.take_free(), self._lanes.mark()

        def wipe() -> None:
            with self._lanes.apart(after):
                self.arena.wipe(slots, copies)
            for seat in seats:
                seat.wipe()

        def give_back() -> None:
            self.arena.give_wiped(slots, copies)
            for seat in seats:
                self.warm.give(seat)

        return Erasure(tiers, wipe, give_back)

    def forget(self, tenant: str) -> None:
        """Drops an erased or distrusted tenant from every tier. The caller has seen to it that nobody holds it."""
        self.warm.drop(tenant)
        memory = self._resident.pop(tenant, None)
        self._claims.pop(tenant, None)
        if memory is not None:
            self.arena.evict(memory)
        self._stale.discard(tenant)
        self.failures.pop(tenant, None)
