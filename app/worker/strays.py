"""Memories of tenants that another server on the same store has erased: here they go within about a minute.

Nothing ever reads them, since a memory is trusted only under a claim that it came with; but erased is erased, in every
server's device and host memory.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING

from app.errors import ServiceError
from app.memory.residency import Residency
from app.store.base import Store

if TYPE_CHECKING:
    from app.worker.engine import Engine

EVERY_SECONDS = 60.0


class Strays:
    """Looks now and then whether the tenants of idle memories are still there. ``step`` is for the worker's loop."""

    def __init__(self, engine: Engine, residency: Residency, store: Store) -> None:
        self._engine, self._residency, self._store = engine, residency, store
        self._next = 0.0
        self._looking = False

    def step(self, now: float) -> None:
        """Begins to look, if it is time; ``now`` is monotonic, in seconds. A tenant that is claimed is nobody else's to
        erase: on a store of one server nothing is ever looked at."""
        if self._looking or now < self._next:
            return
        self._next = now + EVERY_SECONDS
        idle = {t: at for t, at in self._residency.created().items() if not self._store.holds(t)}
        if not idle:
            return
        self._looking = True

        def work() -> list[str]:
            gone = []
            for tenant, created in idle.items():
                # of one that cannot be read it is not known
                with suppress(ServiceError):
                    manifest = self._store.load(tenant)
                    if manifest is None or manifest.created != created:
                        gone.append(tenant)
            return gone

        def done(result: object, error: ServiceError | None) -> None:
            self._looking = False
            self._next = time.monotonic() + EVERY_SECONDS
            if error is None:
                assert isinstance(result, list)
                here = self._residency.created()
                # whoever has come back meanwhile, or has work, is looked at the next time
                self._wipe([t for t in result if here.get(t) == idle[t] and self._engine.quiet(t)])

        self._engine.background("", work, done)

    def _wipe(self, tenants: list[str]) -> None:
        erasures = [self._residency.erase(tenant) for tenant in tenants]
        if not erasures:
            return

        def work() -> None:
            for erasure in erasures:
                erasure.wipe()

        def done(result: object, error: ServiceError | None) -> None:
            for erasure in erasures:
                erasure.give_back()

        self._engine.background("", work, done)
