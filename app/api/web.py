"""The HTTP side of the server: uvicorn around the app. Imported once the worker has been started."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import uvicorn

from app.api.app import create_app
from app.api.protocol import Protocol
from app.api.spool import Spool
from app.api.worker import WorkerClient
from app.keys.watch import WatchedRing
from app.settings import Settings


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves the signals to us: uvicorn would stop listening before running requests are drained."""
        yield


def web_server(
    settings: Settings,
    client: WorkerClient,
    spool: Spool,
    keys: WatchedRing | None,
    *,
    loopback: bool,
    last_seconds: float,
) -> uvicorn.Server:
    """``loopback``: it can be reached from this machine alone. Connections that are still open
    ``last_seconds`` after it was asked to end are cut."""
    config = uvicorn.Config(
        create_app(settings, client, spool, keys, loopback=loopback),
        http=Protocol,
        lifespan="off",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(last_seconds),
    )
    return _Server(config)
