"""What each tenant has been served, as far as fairness goes: virtual token counters.

Sheng et al., Fairness in Serving Large Language Models (OSDI 2024): every token and every byte brought is charged
to its tenant, divided by the tenant's weight, and the least served goes first. A tenant of whom nothing has waited is
lifted to the least served of those who wait, so that idleness earns no credit. No clock, no I/O.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Prices:
    """What a tenant's counter is charged, in prompt tokens.

    ``swap`` is the price of a whole pool brought to the device, in part for a part of it. ``resident`` bounds how far
    a tenant whose memory is there is preferred to one whose memory must be brought.
    """

    prompt: float = 1.0
    output: float = 2.0
    update: float = 1.0
    swap: float = 512.0
    resident: float = 512.0


class Counters:
    """One counter a tenant that has something waiting or running, and of those who left while ahead of all others."""

    def __init__(self) -> None:
        self._served: dict[str, float] = {}
        self._weights: dict[str, float] = {}
        # who left while ahead, the least served first, once each; some have come back since
        self._ahead: list[tuple[float, str]] = []
        self._left: set[str] = set()
        self._last = ""
        self._last_served = 0.0

    def __getitem__(self, tenant: str) -> float:
        return self._served[tenant]

    def __len__(self) -> int:
        return len(self._served)

    def enter(self, tenant: str, waiting: Iterable[str]) -> None:
        """A request comes of a tenant of whom none waits; ``waiting`` are the others whose requests wait.

        Where nobody waits, the one whose request was the last to wait stands for them.
        """
        floor = min((self._served[other] for other in waiting), default=None)
        if floor is None:
            floor = self._served.get(self._last, self._last_served)
        self._served[tenant] = max(self._served.get(tenant, 0.0), floor)

    def weigh(self, tenant: str, weight: float | None) -> None:
        """The weight by which the tenant is charged from now on; None leaves it, or is 1 for one not known yet."""
        if weight is not None or tenant not in self._weights:
            self._weights[tenant] = 1.0 if weight is None else weight

    def begun(self, tenant: str) -> None:
        """The tenant's last request that waited begins."""
        self._last = tenant

    def charge(self, tenant: str, tokens: float) -> None:
        """``tokens`` at their price."""
        self._served[tenant] += tokens / self._weights[tenant]

    def leave(self, tenant: str, others: Collection[str]) -> None:
        """The tenant has nothing left, ``others`` have. Counters that are no higher than all of theirs are forgotten:
        they would be lifted anyway."""
        if tenant == self._last:
            self._last_served = self._served[tenant]
        floor = min((self._served[other] for other in others), default=None)
        if floor is None:
            self._served.clear()
            self._weights.clear()
            self._ahead.clear()
            self._left.clear()
            self._last, self._last_served = "", 0.0
            return
        self._note(tenant)
        while self._ahead and self._ahead[0][0] <= floor:
            _, left = heapq.heappop(self._ahead)
            self._left.discard(left)
            if left in others:
                continue
            if self._served[left] <= floor:
                del self._served[left], self._weights[left]
            else:
                self._note(left)

    def _note(self, tenant: str) -> None:
        if tenant not in self._left:
            self._left.add(tenant)
            heapq.heappush(self._ahead, (self._served[tenant], tenant))

    def gap(self, tenants: Iterable[str]) -> float:
        """How far apart these tenants' weighted service is, in prompt tokens."""
        served = [self._served[tenant] for tenant in tenants]
        return max(served) - min(served) if served else 0.0
