"""Who is let in: bounded work under way, of the server and of each tenant. Refusals are made before any work is done.

A request takes a place: bytes while its body comes in, then itself, then its tokens, and gives all of it back when the
last byte of its answer is out. Until the body has told which tenant it is for, its bytes are charged to the key that it
came with. The worker's scheduler has bounds of its own behind these.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.arrival import Arrival
from app.api.bounds import Bound, Bounds, Clock, Most
from app.api.errors import error_response
from app.errors import BodyTooLarge, ServerBusy, ServiceError, TenantBusy, TooManyTokens
from app.messages import UpdateProgress
from app.settings import Settings

if TYPE_CHECKING:
    from app.api.access import Access

# bytes of a body for each of its tokens: more than a text has, so that nobody is refused for tokens he does not bring
_BYTES_PER_TOKEN = 8
WORK = frozenset({"/generate", "/update", "/score", "/v1/chat/completions", "/v1/completions"})
_IMPORT = re.compile(r"/tenants/[^/]+/import")


class Admission:
    """What is under way. Tenants and keys with nothing under way are forgotten."""

    def __init__(self, settings: Settings, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._own = Most(
            settings.queue_requests_tenant, settings.queue_tokens_tenant, settings.queue_bytes_tenant
        )
        self.server = Bounds(
            Most(settings.queue_requests, settings.queue_tokens, settings.queue_bytes), clock
        )
        self.tenants: dict[str, Bounds] = {}
        self.arriving: dict[str, Bound] = {}
        self.most_tokens = min(settings.queue_tokens, settings.queue_tokens_tenant)
        self.most_bytes = min(settings.queue_bytes, settings.queue_bytes_tenant)

    def of(self, tenant: str) -> Bounds:
        return self.tenants.setdefault(tenant, Bounds(self._own, self._clock))

    def forget(self, tenant: str) -> None:
        if self.tenants[tenant].unused:
            del self.tenants[tenant]

    def check_body(self, announced: int, key: str | None = None) -> None:
        """Before the body is read. Raises ServerBusy, TenantBusy, or BodyTooLarge for what would never fit."""
        if announced > self.most_bytes:
            raise self.too_large()
        self.check_key(key, announced)
        self.check_server("requests", 1)
        self.check_server("bytes", announced)

    def too_large(self) -> BodyTooLarge:
        return BodyTooLarge(f"the body is larger than the {self.most_bytes:,} bytes that can be under way")

    def check_key(self, key: str | None, amount: int) -> None:
        """Raises TenantBusy if the bodies that are coming in with the key have as many bytes as a tenant's may."""
        bound = None if key is None else self.arriving.get(key)
        if bound is not None and not bound.fits(amount):
            raise TenantBusy("too many bytes are coming in with this key", retry_after=bound.wait(amount))

    def take_arriving(self, key: str | None, amount: int) -> None:
        if key is not None and amount:
            self.arriving.setdefault(key, Bound(self._own.bytes, self._clock)).take(amount)

    def give_arriving(self, key: str | None, amount: int) -> None:
        if key is not None and amount:
            self.arriving[key].give(amount)
            if not self.arriving[key].used:
                del self.arriving[key]

    def check_server(self, what: str, amount: int) -> None:
        bound = getattr(self.server, what)
        if not bound.fits(amount):
            raise ServerBusy(f"too many {what} are under way", retry_after=bound.wait(amount))


class Place:
    """What one request has taken. ``key`` is the id of the one it came with, if the server has keys."""

    def __init__(self, admission: Admission, key: str | None = None) -> None:
        self._admission, self._key = admission, key
        self._tenant: str | None = None
        self._listed = self._refused = False
        self._bytes = self._tokens = self._whole = 0

    def take_bytes(self, count: int) -> None:
        """A piece of the body has come: all do before ``enter``. Raises ServerBusy, TenantBusy, BodyTooLarge."""
        if self._bytes + count > self._admission.most_bytes:
            raise self._admission.too_large()
        self._admission.check_key(self._key, count)
        self._admission.check_server("bytes", count)
        self._admission.server.bytes.take(count)
        self._admission.take_arriving(self._key, count)
        self._bytes += count

    def enter_list(self) -> None:
        """The request is about tenants and no one's own. Raises ServerBusy."""
        if not self._listed:
            self._admission.check_server("requests", 1)
            self._admission.server.requests.take(1)
            self._listed = True

    def check_room(self, tenant: str) -> None:
        """Raises TenantBusy if the tenant has as many requests under way as it may."""
        own = self._admission.tenants.get(tenant)
        if own is not None:
            self._check_own(own, "requests", 1)

    def enter(self, tenant: str) -> None:
        """The request is the tenant's, and is about to be worked on. Raises TenantBusy, ServerBusy."""
        admission = self._admission
        if self._tenant is not None:
            return
        own = admission.of(tenant)
        try:
            # by what it has at least: a body that would be refused is not cut into tokens first
            least = self._bytes // _BYTES_PER_TOKEN
            if least > admission.most_tokens:
                # it will be told that it can never fit
                least = 0
            for what, amount in (("requests", 1), ("bytes", self._bytes), ("tokens", least)):
                self._check(own, what, amount)
        except ServiceError:
            admission.forget(tenant)
            raise
        self._tenant = tenant
        for bounds in (own, admission.server):
            bounds.requests.take(1)
        own.bytes.take(self._bytes)
        admission.give_arriving(self._key, self._bytes)

    def _check_own(self, own: Bounds, what: str, amount: int) -> None:
        bound = getattr(own, what)
        if not bound.fits(amount):
            raise TenantBusy(f"this tenant has too many {what} under way", retry_after=bound.wait(amount))

    def _check(self, own: Bounds, what: str, amount: int) -> None:
        self._check_own(own, what, amount)
        if what != "bytes":
            self._admission.check_server(what, amount)

    def take_tokens(self, count: int, param: str | None) -> None:
        """The request's tokens, before they are sent. Raises TooManyTokens (for ever), TenantBusy, ServerBusy.

        Without ``param`` they were let in before: more than can wait are as many as can.
        """
        if param is None:
            count = min(count, self._admission.most_tokens)
        self.check_tokens(count, param)
        if self._tenant is None:
            return
        own = self._admission.tenants[self._tenant]
        self._check(own, "tokens", count)
        for bounds in (own, self._admission.server):
            bounds.tokens.take(count)
        self._tokens = self._whole = count

    def check_tokens(self, count: int, param: str | None) -> None:
        """Raises TooManyTokens if so many can never be let in."""
        if count > self._admission.most_tokens:
            raise TooManyTokens(
                f"{count:,} tokens are more than the {self._admission.most_tokens:,} that can wait here",
                param=param,
            )

    def heard(self, part: object) -> None:
        """The worker has begun: what it has read waits no longer."""
        left = 0
        if isinstance(part, UpdateProgress):
            left = min(self._tokens, self._whole * (part.total - part.done) // part.total)
        elif isinstance(part, ServerBusy | TenantBusy) and self._tenant is not None:
            # the worker has no room left, whatever is free here: until another one has ended
            self._refused = True
            owner = (
                self._admission.tenants[self._tenant]
                if isinstance(part, TenantBusy)
                else self._admission.server
            )
            wait = owner.requests.wait(most=owner.requests.used)
            part.retry_after = max(part.retry_after or 0.0, wait)
        self._give_tokens(self._tokens - left)

    def _give_tokens(self, count: int) -> None:
        if count and self._tenant is not None:
            for bounds in (self._admission.tenants[self._tenant], self._admission.server):
                bounds.tokens.give(count)
            self._tokens -= count

    def wait(self, tenant: str, most: int | None = None) -> float:
        """Seconds until a request more of the tenant fits, of which there may be ``most`` (None: the bound)."""
        own = self._admission.tenants.get(tenant)
        return 1.0 if own is None else own.requests.wait(most=most)

    def leave(self) -> None:
        self._give_tokens(self._tokens)
        self._admission.server.bytes.give(self._bytes)
        if self._tenant is not None:
            own = self._admission.tenants[self._tenant]
            for bounds in (own, self._admission.server):
                bounds.requests.give(1, done=not self._refused)
            own.bytes.give(self._bytes)
            self._admission.forget(self._tenant)
        else:
            self._admission.give_arriving(self._key, self._bytes)
        if self._listed:
            self._admission.server.requests.give(1)
        self._tenant, self._bytes, self._listed, self._refused = None, 0, False, False


class Admit:
    """ASGI middleware: a place for every request; what cannot be served now is refused before its body is read.

    Every body is counted and timed as it comes in, but an import's: that is never held, and its route times it.
    ``require`` raises if no worker serves; ``patience`` is for Arrival.
    """

    def __init__(
        self, app: ASGIApp, admission: Admission, require: Callable[[], object], patience: float
    ) -> None:
        self.app, self._admission, self._require, self._patience = app, admission, require, patience

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        key = _key(scope)
        posted = scope["method"] == "POST"
        if posted and scope["path"] in WORK:
            try:
                self._require()
                self._admission.check_body(_announced(scope), key)
            except ServiceError as error:
                await error_response(error, scope["request_id"])(scope, receive, send)
                return
        place = Place(self._admission, key)
        scope.setdefault("state", {})["place"] = place
        arrival, coming = Arrival(self._patience), True

        async def receive_counted() -> Message:
            nonlocal coming
            if not coming:
                # what comes now is that the client has gone, and need not come soon
                return await receive()
            message = await arrival.piece(receive())
            if message["type"] == "http.request":
                count = len(message.get("body", b""))
                arrival.came(count)
                place.take_bytes(count)
                coming = message.get("more_body", False)
            return message

        # other methods have no body that anyone reads
        held = posted and not is_import(scope)
        try:
            await self.app(scope, receive_counted if held else receive, send)
        finally:
            place.leave()


def is_import(scope: Scope) -> bool:
    """Whether the body is a memory's file, which has bounds of its own."""
    return scope["method"] == "POST" and _IMPORT.fullmatch(scope["path"]) is not None


def _key(scope: Scope) -> str | None:
    access: Access = scope["state"]["access"]
    return None if access.key is None else access.key.id


def _announced(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value[:20])
    return 0


def place_of(request: Request) -> Place:
    place = request.state.place
    assert isinstance(place, Place)
    return place
