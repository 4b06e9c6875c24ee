"""What a tenant may still take in, by what its store remembers: limits outlive restarts, and nothing counts apart."""

from __future__ import annotations

from app.errors import QuotaExceeded
from app.messages import Update
from app.store.base import Store

DAY = 86_400.0


def check(store: Store, message: Update, remaining: int, block_bytes: int, now: float) -> None:
    """Raises QuotaExceeded if ``remaining`` contexts, of ``block_bytes`` each in the store, are too many now.

    ``now`` is Unix time. Runs in any thread; raises as Store.history. A tenant's updates are one after another, so that
    nothing comes between this and their commits.
    """
    if message.most_bytes:
        used = store.usage(message.tenant) + remaining * block_bytes
        if used > message.most_bytes:
            raise QuotaExceeded(
                f"this update would bring the tenant to {used:,} bytes in the store, its limit is "
                f"{message.most_bytes:,}"
            )
    if not message.updates_per_day:
        return
    times = sorted(r.time for r in store.history(message.tenant) if r.time > now - DAY)
    over = len(times) + remaining - message.updates_per_day
    if over <= 0:
        return
    told = f"{len(times)} contexts of this tenant were taken in within 24 hours, its limit is {message.updates_per_day}"
    # when as many of them are a day old as there are too many now; never, if it is too large by itself
    wait = times[over - 1] + DAY - now if over <= len(times) else None
    raise QuotaExceeded(told, retry_after=wait)
