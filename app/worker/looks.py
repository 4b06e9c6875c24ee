"""What only looks at the store, a few at a time, tenants in turns: nobody's looking holds up loads and commits."""

from __future__ import annotations

import contextvars
from collections import deque
from collections.abc import Callable
from functools import partial

from app.errors import ServiceError
from app.memory.residency import Submit

Done = Callable[[object, ServiceError | None], None]
Look = tuple[contextvars.Context, Callable[[], object], Done]

MOST = 2
"""Looks under way at once: each that computes takes time from the steps."""


class Looks:
    """Looks that wait, by tenant, and those in threads of ``submit``'s."""

    def __init__(self, submit: Submit) -> None:
        self._submit = submit
        self._waiting: dict[str, deque[Look]] = {}
        self._under_way = 0

    def submit(self, tenant: str, work: Callable[[], object], done: Done) -> None:
        """``work`` in a thread when the tenant's turn has come, then ``done`` in the loop's."""
        self._waiting.setdefault(tenant, deque()).append((contextvars.copy_context(), work, done))
        self._begin()

    def _begin(self) -> None:
        while self._waiting and self._under_way < MOST:
            tenant = next(iter(self._waiting))
            queue = self._waiting.pop(tenant)
            context, work, done = queue.popleft()
            if queue:
                # behind all others
                self._waiting[tenant] = queue
            self._under_way += 1
            # logged about its own request, whoever made room for it
            context.run(self._submit, work, partial(self._ended, done))

    def _ended(self, done: Done, result: object, error: ServiceError | None) -> None:
        self._under_way -= 1
        self._begin()
        done(result, error)
