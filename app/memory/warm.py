"""The warm tier: copies of pools in host memory, within a budget of bytes.

A copy is a whole pool by slot, so that coming back is one transfer and no projection. It stays when its tenant
becomes resident; as long as the memory has not changed, leaving again costs nothing. Buffers are all of one
size and used again: pinned host memory is slow to get.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import structlog
from torch import Tensor

log = structlog.get_logger("worker")


@dataclass(eq=False)
class Buffers:
    """Host memory of one copy: a pool's ``parts`` (see ``Pools.parts``) and its ``tail`` [L, K, d]."""

    parts: tuple[Tensor, ...]
    tail: Tensor


class Seat:
    """Room for one copy; the memory itself is got when it is first filled, in the thread that fills it.

    ``lacking`` says why it was not to be had, if so.
    """

    def __init__(self, make: Callable[[], Buffers]) -> None:
        self._make = make
        self._buffers: Buffers | None = None
        self.lacking: str | None = None

    def wipe(self) -> None:
        """Overwrites what was copied here, if anything was."""
        if self._buffers is not None:
            for part in (*self._buffers.parts, self._buffers.tail):
                part.zero_()

    @property
    def buffers(self) -> Buffers:
        """Raises RuntimeError, as torch does, or MemoryError if the memory is not to be had."""
        if self._buffers is None:
            try:
                self._buffers = self._make()
            except (RuntimeError, MemoryError) as error:
                self.lacking = str(error) or type(error).__name__
                raise
        return self._buffers


@dataclass(frozen=True, eq=False)
class Warm:
    """A copy and what it is a copy of: ``rank`` int32 [L, N + K], ``born`` int32 [L or 1, N].

    ``content`` is as in ``app.store.base.content``.
    """

    content: tuple[float, int, int]
    rank: Tensor
    born: Tensor
    seat: Seat


class WarmTier:
    """Least recently used copies go first, those of resident tenants before all others."""

    def __init__(self, budget: int, each: int, make: Callable[[], Buffers]) -> None:
        """``budget`` and ``each`` (one copy) in bytes; ``make`` gets the memory of one copy."""
        self.each = each
        self.evictions = 0
        self._make = make
        self._unmade = budget // each
        self._grows = True
        self._free: list[Seat] = []
        self._copies: OrderedDict[str, Warm] = OrderedDict()
        self._held: dict[str, Warm] = {}

    def __contains__(self, tenant: str) -> bool:
        return tenant in self._copies

    def __len__(self) -> int:
        return len(self._copies)

    def items(self) -> Iterable[tuple[str, Warm]]:
        return self._copies.items()

    @property
    def bytes(self) -> int:
        return len(self._copies) * self.each

    def get(self, tenant: str) -> Warm | None:
        return self._copies.get(tenant)

    def hold(self, tenant: str) -> Warm | None:
        """The tenant's copy, kept until ``let_go``, or None."""
        warm = self._copies.get(tenant)
        if warm is not None:
            self._copies.move_to_end(tenant)
            self._held[tenant] = warm
        return warm

    def let_go(self, tenant: str) -> None:
        warm = self._held.pop(tenant, None)
        if warm is not None and self._copies.get(tenant) is not warm:
            self.give(warm.seat)

    def seat(self, resident: Callable[[str], bool]) -> Seat | None:
        """Room for another copy, if need be in the place of one that is not held; else None."""
        if self._free:
            return self._free.pop()
        if self._unmade:
            self._unmade -= 1
            return Seat(self._make)
        least: str | None = None
        for tenant in self._copies:
            if tenant in self._held:
                continue
            if resident(tenant):
                least = tenant
                break
            least = least or tenant
        if least is None:
            return None
        self.evictions += not resident(least)
        return self._copies.pop(least).seat

    def put(self, tenant: str, warm: Warm) -> None:
        self.drop(tenant)
        self._copies[tenant] = warm

    def give(self, seat: Seat) -> None:
        """Takes back a seat whose copy nobody wants."""
        self._free.append(seat)

    def lose(self, seat: Seat) -> None:
        """Takes back a seat whose memory was not to be had. The tier grows no more: the next would fare no better."""
        self._unmade = 0
        if self._grows:
            self._grows = False
            log.warning("no host memory for more warm copies", copies=len(self._copies), error=seat.lacking)

    def take_free(self) -> list[Seat]:
        """Takes the free seats out of use, to be wiped and given back: somebody's memory may be in them."""
        free, self._free = self._free, []
        return free

    def drop(self, tenant: str) -> None:
        """Forgets the tenant's copy; its seat is free once nobody holds it."""
        warm = self._copies.pop(tenant, None)
        if warm is not None and self._held.get(tenant) is not warm:
            self.give(warm.seat)
