"""The app factory: routes, error handlers and middleware around the workers it is given."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from app.api import errors, generate, memories, operations, rebuild, score, tenants, transfers, update
from app.api.access import Gate
from app.api.admission import Admission, Admit
from app.api.answers import ErrorAnswer
from app.api.hosts import Hosts, asks_for_host
from app.api.middleware import BodyLimit, LastResort, Requests
from app.api.openai import routes as openai
from app.api.operations import NAME, installed_version
from app.api.origins import Origins
from app.api.services import Services
from app.api.spool import Spool
from app.api.stream import ClientGone
from app.api.worker import WorkerClient, Workers
from app.keys.watch import WatchedRing
from app.settings import Settings

_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {
        "model": ErrorAnswer,
        "description": "the body is empty or no JSON, or a prompt is too long (OpenAI's protocol)",
    },
    401: {"model": ErrorAnswer, "description": "no API key, or none that is known"},
    403: {
        "model": ErrorAnswer,
        "description": "the API key is not for this call, or the server has another name",
    },
    404: {"model": ErrorAnswer, "description": "no such path, tenant or model"},
    408: {"model": ErrorAnswer, "description": "the body comes too slowly"},
    409: {"model": ErrorAnswer, "description": "in conflict with the state of the tenant"},
    413: {"model": ErrorAnswer, "description": "the body is too large"},
    415: {"model": ErrorAnswer, "description": "the content type is not application/json"},
    422: {"model": ErrorAnswer, "description": "a field is wrong; param names it"},
    429: {
        "model": ErrorAnswer,
        "description": "the tenant's queue is full, or a limit of its own is reached",
    },
    500: {"model": ErrorAnswer, "description": "an internal error"},
    503: {"model": ErrorAnswer, "description": "starting, restarting, overloaded or shutting down"},
    504: {"model": ErrorAnswer, "description": "the deadline has passed"},
    507: {"model": ErrorAnswer, "description": "the store is full"},
}


class _Documented(FastAPI):
    """The document says that there may be keys. The gate looks at them: FastAPI's own way would do so once more."""

    def openapi(self) -> dict[str, Any]:
        document = super().openapi()
        scheme = {"type": "http", "scheme": "bearer", "description": "an API key, where the server has keys"}
        document.setdefault("components", {}).setdefault("securitySchemes", {})["HTTPBearer"] = scheme
        document["security"] = [{"HTTPBearer": []}]
        return document


def create_app(
    settings: Settings,
    worker: WorkerClient | Workers,
    spool: Spool | None = None,
    keys: WatchedRing | None = None,
    *,
    loopback: bool = False,
) -> FastAPI:
    """The HTTP side of the server. It starts no process: who gives it ``worker`` looks after that.

    ``keys`` are asked of every request; without them nobody is turned away, but for the
    name that he calls the server by, where it listens on the ``loopback`` alone. ``spool`` is closed by who gives it
    too; without one, files of transfers go where the settings say.
    """
    workers = worker if isinstance(worker, Workers) else Workers([worker])
    metrics = workers.clients[0].metrics
    app = _Documented(
        title=NAME,
        version=installed_version(),
        description="A model server whose users each have a memory of their own.",
        redirect_slashes=False,
        responses=_ERRORS,
    )
    spool = spool or Spool(settings.spool_dir, settings.max_transfers)
    app.state.services = Services(settings, workers, metrics, spool)
    for module in (update, generate, score, tenants, memories, transfers, rebuild, openai, operations):
        app.include_router(module.router)
    errors.install(app)

    async def client_gone(request: Request, error: Exception) -> Response:
        # nobody reads it; the status is for the log
        return Response(status_code=499)

    app.add_exception_handler(ClientGone, client_gone)
    app.add_middleware(
        Admit, admission=Admission(settings), require=workers.require, patience=settings.body_timeout
    )
    app.add_middleware(BodyLimit, limit=settings.max_body_bytes)
    # before the body is looked at: a stranger's is not worth reading
    app.add_middleware(Gate, settings=settings, keys=keys)
    if asks_for_host(settings, keys=keys is not None, loopback=loopback):
        app.add_middleware(Hosts, settings=settings)
    app.add_middleware(LastResort)
    if settings.allow_origin:
        # around all that refuses: an answer without its headers is none for a page, and a preflight has no key
        app.add_middleware(Origins, origins=settings.allow_origin)
    app.add_middleware(Requests, metrics=metrics)
    return app
