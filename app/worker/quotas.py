"""What a tenant may still take in: by what its store remembers, of blocks that were rolled back as well, so that limits
outlive restarts; and by what this worker has seen it take in, since of an erased tenant the store remembers nothing."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

from app.errors import QuotaExceeded, ServiceError
from app.messages import EraseTenant, Update
from app.store.base import Store
from app.store.lineages import undone

DAY = 86_400.0


class Taken:
    """When tenants with a daily limit took contexts in, for a day. Kept in memory alone. ``note`` is for the worker's
    loop, ``within_a_day`` for any one thread at a time of a tenant's."""

    def __init__(self) -> None:
        # never empty ones
        self._times: dict[str, list[float]] = {}

    def note(self, tenant: str, new: Iterable[float]) -> None:
        """Contexts were committed at these times, as their records say it; some may have been noted before."""
        times = sorted({*self._times.pop(tenant, ()), *new})
        if not times:
            return
        last = times[-1]
        self._times[tenant] = [time for time in times if time > last - DAY]
        # those that have been silent for a day are in front, but for one whose old times were noted when it was erased
        while self._times[first := next(iter(self._times))][-1] <= last - DAY:
            del self._times[first]

    def within_a_day(self, tenant: str, now: float) -> set[float]:
        return {time for time in self._times.get(tenant, ()) if time > now - DAY}


def remembered(store: Store, tenant: str, now: float) -> list[float]:
    """When contexts were taken in within a day before ``now``, as far as the store remembers; those that were rolled
    back too. Any thread; raises as Store.times."""
    manifest = store.load(tenant)
    gone = () if manifest is None else undone(manifest)
    return [time for time in (*gone, *store.times(tenant)) if time > now - DAY]


def of_the_erased(store: Store, message: EraseTenant, now: float) -> list[float]:
    """What must be noted of a tenant before it is erased, that is held to a daily limit. Any thread; raises nothing."""
    if message.updates_per_day:
        with suppress(ServiceError):
            return remembered(store, message.tenant, now)
    return []


def check_bytes(used: int, most: int) -> None:
    """Raises QuotaExceeded if ``used`` bytes are more than ``most`` (0: no limit)."""
    if most and used > most:
        raise QuotaExceeded(
            f"this would bring the tenant to {used:,} bytes in the store, its limit is {most:,}"
        )


def check(store: Store, taken: Taken, message: Update, remaining: int, block_bytes: int, now: float) -> None:
    """Raises QuotaExceeded if ``remaining`` contexts, of ``block_bytes`` each in the store, are too many now.

    ``now`` is Unix time. Runs in any thread; raises as Store.times. A tenant's updates are one after another, so that
    nothing comes between this and their commits.
    """
    if message.most_bytes:
        check_bytes(store.usage(message.tenant) + remaining * block_bytes, message.most_bytes)
    if not message.updates_per_day:
        return
    kept = remembered(store, message.tenant, now)
    times = sorted([*kept, *(taken.within_a_day(message.tenant, now) - set(kept))])
    over = len(times) + remaining - message.updates_per_day
    if over <= 0:
        return
    told = f"{len(times)} contexts of this tenant were taken in within 24 hours, its limit is {message.updates_per_day}"
    # when as many of them are a day old as there are too many now; never, if it is too large by itself
    wait = times[over - 1] + DAY - now if over <= len(times) else None
    raise QuotaExceeded(told, retry_after=wait)
