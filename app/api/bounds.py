"""How much may be under way at once, and when a place will be free: measured, not guessed. Pure; time is passed in."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, fields

Clock = Callable[[], float]

SHORTEST, LONGEST = 1.0, 60.0
"""Seconds that anybody is asked to wait."""
# what is given back is measured over so many times, of the last so many seconds
_SAMPLES = 64
_WINDOW = 30.0
_FEWEST = 4


class Bound:
    """A sum that never exceeds ``most``, and how fast it is given back while anything is taken.

    Whoever finds no room is told when there will be room for him too, behind those who were told before: a crowd
    that comes back when it was told finds one place each. Places are not reserved.
    """

    def __init__(self, most: int, clock: Clock) -> None:
        self.most, self.used = most, 0
        self._clock = clock
        # seconds in which something was taken, until ``_since``; idle time says nothing of speed
        self._busy, self._since = 0.0, 0.0
        self._given: deque[tuple[float, int]] = deque()
        self._sum, self._from = 0, 0.0
        self._promised = 0.0

    def fits(self, amount: int) -> bool:
        return self.used + amount <= self.most

    def take(self, amount: int) -> None:
        if amount and not self.used:
            self._since = self._clock()
        self.used += amount

    def give(self, amount: int, *, done: bool = True) -> None:
        """``done``: it has been served, which says something of the pace."""
        if not amount:
            return
        busy = self._busy_seconds()
        self.used -= amount
        if not self.used:
            self._busy = busy
        if not done:
            return
        self._given.append((busy, amount))
        self._sum += amount
        self._forget(busy)

    def _busy_seconds(self) -> float:
        return self._busy + (self._clock() - self._since if self.used else 0.0)

    def _forget(self, busy: float) -> None:
        given = self._given
        while len(given) > _SAMPLES or (len(given) > _FEWEST and given[0][0] < busy - _WINDOW):
            self._from, amount = given.popleft()
            self._sum -= amount

    def wait(self, amount: int = 1, *, most: int | None = None) -> float:
        """Seconds until ``amount`` will fit into ``most``, as things go now; within SHORTEST and LONGEST."""
        now, busy = self._clock(), self._busy_seconds()
        self._forget(busy)
        seconds = busy - self._from
        if not self._sum or seconds <= 0:
            # nothing has come back yet: as long again as it has been
            return min(max(seconds, SHORTEST), LONGEST)
        rate = self._sum / seconds
        free = (self.most if most is None else most) - self.used
        due = max(now - free / rate, self._promised) + amount / rate
        self._promised = min(due, now + LONGEST)
        return min(max(due - now, SHORTEST), LONGEST)


@dataclass(frozen=True)
class Most:
    """What may be under way: requests until they are answered, tokens until they are begun, bytes of bodies."""

    requests: int
    tokens: int
    bytes: int


class Bounds:
    """The three bounds of one owner, the server or a tenant."""

    def __init__(self, most: Most, clock: Clock) -> None:
        self.requests = Bound(most.requests, clock)
        self.tokens = Bound(most.tokens, clock)
        self.bytes = Bound(most.bytes, clock)

    @property
    def unused(self) -> bool:
        return not any(getattr(self, field.name).used for field in fields(Most))
