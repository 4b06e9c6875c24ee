"""What a tenant may still take in: by what its store remembers, so that limits outlive restarts, and by what this
worker has seen it take in, so that rolling back or erasing gives none of it back."""

from __future__ import annotations

from collections import deque

from app.errors import QuotaExceeded
from app.messages import Update
from app.store.base import Store

DAY = 86_400.0


class Taken:
    """When tenants with a daily limit took contexts in, for a day. Kept in memory alone. Called in any one thread at a
    time of a tenant's."""

    def __init__(self) -> None:
        self._times: dict[str, deque[float]] = {}

    def note(self, tenant: str, time: float) -> None:
        """A context was committed at ``time``, as its record says it."""
        # in order of their last, so that those that have been silent for a day are in front
        times = self._times.pop(tenant, deque())
        times.append(time)
        self._times[tenant] = times
        while self._times[first := next(iter(self._times))][-1] <= time - DAY:
            del self._times[first]

    def within_a_day(self, tenant: str, now: float) -> set[float]:
        times = self._times.get(tenant, deque())
        while times and times[0] <= now - DAY:
            times.popleft()
        return set(times)


def check_bytes(used: int, most: int) -> None:
    """Raises QuotaExceeded if ``used`` bytes are more than ``most`` (0: no limit)."""
    if most and used > most:
        raise QuotaExceeded(
            f"this would bring the tenant to {used:,} bytes in the store, its limit is {most:,}"
        )


def check(store: Store, taken: Taken, message: Update, remaining: int, block_bytes: int, now: float) -> None:
    """Raises QuotaExceeded if ``remaining`` contexts, of ``block_bytes`` each in the store, are too many now.

    ``now`` is Unix time. Runs in any thread; raises as Store.history. A tenant's updates are one after another, so that
    nothing comes between this and their commits.
    """
    if message.most_bytes:
        check_bytes(store.usage(message.tenant) + remaining * block_bytes, message.most_bytes)
    if not message.updates_per_day:
        return
    kept = [r.time for r in store.history(message.tenant) if r.time > now - DAY]
    times = sorted([*kept, *(taken.within_a_day(message.tenant, now) - set(kept))])
    over = len(times) + remaining - message.updates_per_day
    if over <= 0:
        return
    told = f"{len(times)} contexts of this tenant were taken in within 24 hours, its limit is {message.updates_per_day}"
    # when as many of them are a day old as there are too many now; never, if it is too large by itself
    wait = times[over - 1] + DAY - now if over <= len(times) else None
    raise QuotaExceeded(told, retry_after=wait)
