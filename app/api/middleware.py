"""Pure ASGI middleware around every request: its id, its log line, the last resort for errors, and its size."""

from __future__ import annotations

import hashlib
import re
import time
import uuid
from typing import Any

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.admission import WORK, is_import
from app.api.errors import error_response, note
from app.api.metrics import Metrics
from app.errors import BodyTooLarge, ServiceError

log = structlog.get_logger("api")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_QUIET_ROUTES = {"/health", "/ready", "/metrics"}


def tenant_mark(tenant: str) -> str:
    """Stands for a tenant in the log: the same for the same tenant, and not his name."""
    return hashlib.sha256(tenant.encode("utf-8", "surrogatepass")).hexdigest()[:12]


class Requests:
    """Gives each request an id, logs and counts it.

    ``open`` is the number of requests in work.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics
        self.open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        sent = _header(scope, b"x-request-id")
        id = sent if _REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex
        scope["request_id"] = id
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=id)
        _keep_tenant_encoded(scope)
        status = 0
        began = scope.setdefault("began", time.perf_counter())

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", id.encode())]
            await send(message)

        self.open += 1
        try:
            await self.app(scope, receive, send_with_id)
        finally:
            self.open -= 1
            self._record(scope, id, status or 499, time.perf_counter() - began)

    def _record(self, scope: Scope, id: str, status: int, seconds: float) -> None:
        # what is refused before it is routed is counted where it wanted to go
        wanted = scope["path"] if scope["path"] in WORK else "unmatched"
        route = getattr(scope.get("route"), "path", wanted)
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self.metrics.requests.labels(route, method, str(status)).inc()
        self.metrics.request_seconds.labels(route).observe(seconds)
        fields: dict[str, Any] = {"request_id": id, "method": method, "route": route, "status": status}
        tenant = scope.get("state", {}).get("tenant")
        if tenant is not None:
            fields["tenant"] = tenant_mark(tenant)
        write = log.debug if route in _QUIET_ROUTES else log.info
        error = scope.get("error")
        if error is not None:
            self.metrics.errors.labels(error.code).inc()
            fields["code"] = error.code
            if error.serious or error.status >= 500:
                fields["reason"] = error.message
            if error.serious:
                write = log.warning
        write("request", **fields, ms=round(seconds * 1000, 1))


_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}


def _header(scope: Scope, name: bytes) -> str:
    for key, value in scope["headers"]:
        if key == name:
            return str(value.decode("latin-1"))
    return ""


def _keep_tenant_encoded(scope: Scope) -> None:
    """A tenant's name may hold a slash: below /tenants/ routes see the path as it was sent.

    ``app.api.tenants`` decodes the name itself, strictly.
    """
    raw = scope.get("raw_path")
    if raw and raw.startswith(b"/tenants/"):
        scope["path"] = raw.decode("latin-1")


class LastResort:
    """Answers 500 where nothing else caught an error. What adds headers to every answer is around it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun = False

        async def send_noted(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self.app(scope, receive, send_noted)
        except Exception:
            id = scope["request_id"]
            log.exception("unhandled error", request_id=id)
            error = ServiceError("an internal error; the server's log has the details under this request id")
            if not begun:
                await error_response(error, id)(scope, receive, send)
            else:
                # a stream that has begun ends here, under status 200
                note(scope, error)


class BodyLimit:
    """Refuses a body over ``limit`` bytes, by its announced length or while it comes in.

    An imported memory has a bound of its own, which its route keeps.
    """

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app = app
        self.limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or is_import(scope):
            await self.app(scope, receive, send)
            return
        error = BodyTooLarge(f"the body is larger than the {self.limit:,} bytes that are allowed")
        announced = _header(scope, b"content-length")
        if announced.isascii() and announced.isdigit() and int(announced[:20]) > self.limit:
            await error_response(error, scope["request_id"])(scope, receive, send)
            return
        taken = 0

        async def receive_limited() -> Message:
            nonlocal taken
            message = await receive()
            if message["type"] == "http.request":
                taken += len(message.get("body", b""))
                if taken > self.limit:
                    raise error
            return message

        await self.app(scope, receive_limited, send)
