"""The HTTP side of the server: uvicorn around the app. Imported once the worker has been started."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import structlog
import uvicorn

from app.api.app import create_app
from app.api.protocol import Protocol
from app.api.spool import Spool
from app.api.worker import WorkerClient
from app.errors import ServiceError
from app.keys.watch import WatchedRing
from app.settings import Settings

log = structlog.get_logger("api")


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

    class Counted(Protocol):
        @staticmethod
        def refused(error: ServiceError, request_id: str) -> None:
            client.metrics.errors.labels(error.code).inc()
            log.info("request refused", request_id=request_id, status=error.status, code=error.code)

    config = uvicorn.Config(
        create_app(settings, client, spool, keys, loopback=loopback),
        http=Counted,
        lifespan="off",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(last_seconds),
    )
    return _Server(config)
