"""Who asks, and what they may: the one place where keys, tenants and requests at once are checked.

The middleware turns away whoever has no key. Endpoints name their tenant through ``tenant_of``; a tenant that is not
the key's is answered exactly as one that does not exist, and nobody is asked about it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.admission import WORK, place_of
from app.api.errors import error_response
from app.errors import Forbidden, InvalidRequest, QuotaExceeded, TenantNotFound, Unauthorized
from app.keys.ring import Key, Limits
from app.keys.watch import WatchedRing
from app.settings import Settings

# told to anyone: whether the server lives, and what it can be asked
OPEN_PATHS = frozenset(
    {"/", "/health", "/ready", "/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json"}
)
_SCHEME = b"bearer "
_LONGEST = 256
METRICS = "/metrics"


@dataclass(eq=False)
class Access:
    """One request's rights. ``key`` None: the server has no keys, and everyone may everything."""

    key: Key | None
    open: Counter[str]
    base: Limits
    held: str | None = None
    wait: Callable[[str, int], float] = lambda tenant, most: 1.0

    def may(self, tenant: str) -> bool:
        return self.key is None or self.key.may(tenant)

    @property
    def bound(self) -> list[str] | None:
        """The names, and beginnings with a ``*`` behind them, of the tenants that this request may see. None: all."""
        return None if self.key is None or self.key.admin else list(self.key.tenants)

    @property
    def limits(self) -> Limits:
        return self.base if self.key is None else self.key.limits.over(self.base)

    def enter(self, tenant: str) -> None:
        """Counts the request among the tenant's own. Raises QuotaExceeded."""
        if self.held is not None:
            return
        most = self.limits.concurrent
        if most and self.open[tenant] >= most:
            raise QuotaExceeded(
                f"this tenant has {most} requests under way, its limit", retry_after=self.wait(tenant, most)
            )
        self.open[tenant] += 1
        self.held = tenant

    def leave(self) -> None:
        if self.held is not None:
            self.open[self.held] -= 1
            if not self.open[self.held]:
                del self.open[self.held]
            self.held = None


class Gate:
    """ASGI middleware: every request gets its Access, or a 401. Requests are counted until their last byte is out."""

    def __init__(self, app: ASGIApp, settings: Settings, keys: WatchedRing | None) -> None:
        self.app, self._keys = app, keys
        self._open: Counter[str] = Counter()
        self._base = Limits(
            settings.tenant_updates_per_day, settings.tenant_bytes, settings.tenant_concurrent
        )
        self._open_metrics = settings.open_metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        access = Access(None, self._open, self._base)
        if self._keys is not None and scope["path"] not in OPEN_PATHS:
            try:
                access.key = self._key(scope, self._keys)
            except (Unauthorized, Forbidden) as error:
                response = error_response(error, scope["request_id"])
                if isinstance(error, Unauthorized):
                    response.headers["www-authenticate"] = 'Bearer realm="memoryllm"'
                await response(scope, receive, send)
                return
        scope.setdefault("state", {})["access"] = access
        try:
            await self.app(scope, receive, send)
        finally:
            access.leave()

    def _key(self, scope: Scope, keys: WatchedRing) -> Key | None:
        """Raises Unauthorized, Forbidden."""
        metrics = scope["path"] == METRICS
        if metrics and self._open_metrics:
            return None
        sent = [value for name, value in scope["headers"] if name == b"authorization"]
        if not sent:
            raise Unauthorized("an API key is needed: Authorization: Bearer mllm-…")
        value = sent[0]
        if len(sent) > 1 or len(value) > _LONGEST or value[: len(_SCHEME)].lower() != _SCHEME:
            raise Unauthorized("the Authorization header is not one Bearer key")
        try:
            key = keys.ring.find(value[len(_SCHEME) :].strip(b" ").decode("ascii"))
        except UnicodeDecodeError:
            key = None
        if key is None:
            raise Unauthorized("this API key is not known to the server")
        if metrics and not key.admin:
            raise Forbidden("metrics are for admin keys")
        return key


def access_of(request: Request) -> Access:
    access = request.state.access
    assert isinstance(access, Access)
    return access


def weight_of(request: Request) -> int:
    """The share of the request's tenant among others: its key's, or 1."""
    return access_of(request).limits.weight or 1


def tenant_of(
    request: Request, named: str | None, *, param: str = "tenant", missing: str = "a tenant is needed"
) -> str:
    """The tenant that a request is about: the one it names, or the one its key is for.

    Notes it for the log, where only a mark of it is written, and takes a place for the request among the tenant's.
    Raises TenantNotFound for one that is not the key's, InvalidRequest if none is named and none is clear,
    QuotaExceeded, TenantBusy, ServerBusy.
    """
    access = access_of(request)
    tenant = named
    if tenant is None and access.key is not None:
        tenant = access.key.own
    if tenant is None:
        raise InvalidRequest(missing, param=param)
    require(request, tenant)
    request.state.tenant = tenant
    place = place_of(request)
    access.wait = place.wait
    access.enter(tenant)
    place.enter(tenant)
    return tenant


def check_room(request: Request, named: object) -> None:
    """Raises TenantBusy for work of a tenant that has no place left, before anything else of it is looked at: he who
    asks for far too much is refused at a quarter of the price. What is let through is checked by ``tenant_of``."""
    access = access_of(request)
    tenant = access.key.own if named is None and access.key is not None else named
    if request.scope["path"] in WORK and isinstance(tenant, str) and access.may(tenant):
        request.state.tenant = tenant
        place_of(request).check_room(tenant)


def require(request: Request, tenant: str) -> None:
    """Raises TenantNotFound, as for a tenant that does not exist, unless the request's key is for it."""
    if not access_of(request).may(tenant):
        raise TenantNotFound("there is no such tenant")
