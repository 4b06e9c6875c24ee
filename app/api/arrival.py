"""How long a body may take to come in: a client that sends slowly must not keep what is counted for it for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from app.errors import RequestTooSlow

T = TypeVar("T")

# bytes a second; no link that is of use is slower
SLOWEST = 64 << 10


class Arrival:
    """One body on its way. It may never stand still for ``patience`` seconds; and behind the first ``patience``
    seconds it has to come at SLOWEST on the average, so that a trickle is no way round that.

    Only the time in which the client is waited for counts, not what the server does with the pieces.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._waited, self._taken = 0.0, 0

    async def piece(self, coming: Awaitable[T]) -> T:
        """The next one. Raises RequestTooSlow."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        left = min(self._patience, self._patience + self._taken / SLOWEST - self._waited)
        try:
            async with asyncio.timeout(left):
                return await coming
        except TimeoutError:
            raise RequestTooSlow("the body comes too slowly, or has stopped") from None
        finally:
            self._waited += loop.time() - began

    def came(self, count: int) -> None:
        """``count`` bytes of it."""
        self._taken += count
