"""Which tenants this server may write: leases that are renewed while somebody works, and numbers that fence.

The lease is for speed: while it surely holds nobody else writes, so what is known of the tenant need not be asked for.
Correctness does not hang on it: every write names its claim, and the server refuses one whose number is not the last.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import redis

from app.errors import StoreFailed, TenantElsewhere
from app.store.home import tenant_id
from app.store.redis_scripts import CLAIM, RELEASE, RENEW
from app.store.redis_server import Server

# a lease counts as held until this share of it is left, for clocks and networks that are late
_MARGIN = 0.25


@dataclass
class Claim:
    """``until`` is monotonic time; ``holder`` is what fences; ``idle`` when nobody here needs the tenant."""

    holder: bytes
    until: float
    idle: bool = False


@dataclass(frozen=True)
class Claimed:
    """What the server said at a claim: ``manifest`` as it lies there, and if the tenant is listed or half erased."""

    holder: bytes
    manifest: bytes | None
    listed: bool
    erasing: bool


class Keys:
    """Names of a tenant's keys: the tenant's id is a hash of its name, which itself never reaches a key."""

    def __init__(self, prefix: str) -> None:
        self.index = f"{prefix}:tenants"
        self.format = f"{prefix}:format"
        self.key = f"{prefix}:key"
        self._prefix = prefix

    def of(self, tenant: str, what: str) -> str:
        return f"{self._prefix}:{{{tenant_id(tenant)}}}:{what}"


class Leases:
    """``lost`` is told of a tenant whose claim is over, so that nothing remembered of it is believed."""

    def __init__(self, server: Server, keys: Keys, lost: Callable[[str], None]) -> None:
        self._server, self._keys, self._lost = server, keys, lost
        self._name = secrets.token_hex(8)
        self._ttl = server.options.lease
        self._claims: dict[str, Claim] = {}
        self._guard = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="redis-leases", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Gives everything up."""
        self._stop.set()
        self._thread.join(timeout=5)
        with self._guard:
            claims, self._claims = self._claims, {}
        with suppress(redis.RedisError):
            for tenant, claim in claims.items():
                self._give(tenant, claim)

    # ------------------------------------------------------------ claims

    def holder(self, tenant: str) -> bytes | None:
        """The claim's mark while it surely holds."""
        with self._guard:
            claim = self._claims.get(tenant)
            return claim.holder if claim is not None and time.monotonic() < claim.until else None

    def take(self, tenant: str, *, anew: bool = False) -> Claimed:
        """Claims the tenant, or claims it again. ``anew`` fences off what this server itself has under way.

        Raises TenantElsewhere, StoreFull, StoreFailed.
        """
        began = time.monotonic()
        keys = [
            self._keys.of(tenant, k) for k in ("lease", "holder", "fence", "wanted", "manifest", "erasing")
        ]
        arguments = [self._name, int(self._ttl * 1000), tenant, int(anew)]
        script = self._server.script(CLAIM)
        answer = self._server.again(
            "claiming a tenant", lambda: script(keys=[*keys, self._keys.index], args=arguments)
        )
        if not answer[0]:
            left = max(int(answer[1]), 0) / 1000
            raise TenantElsewhere(
                "another server is at work for this tenant", retry_after=round(min(left, self._ttl) + 0.05, 2)
            )
        _, holder, manifest, listed, erasing = answer
        with self._guard:
            self._claims[tenant] = Claim(holder, began + self._ttl * (1 - _MARGIN))
        return Claimed(holder, manifest, bool(listed), bool(erasing))

    def release(self, tenant: str) -> None:
        """Nobody here needs the tenant now: another server may have it for the asking."""
        with self._guard:
            if tenant in self._claims:
                self._claims[tenant].idle = True

    def use(self, tenant: str) -> None:
        """Somebody here needs the tenant again."""
        with self._guard:
            if tenant in self._claims:
                self._claims[tenant].idle = False

    def drop(self, tenant: str) -> None:
        """This claim is not to be believed any more."""
        with self._guard:
            self._claims.pop(tenant, None)
        self._lost(tenant)

    # ------------------------------------------------------------ renewing

    def _run(self) -> None:
        while not self._stop.wait(self._ttl / 5):
            for tenant, claim in self._due():
                # a server that cannot be reached ends the claims by their time
                with suppress(redis.RedisError, StoreFailed):
                    self._renew(tenant, claim)

    def _due(self) -> list[tuple[str, Claim]]:
        with self._guard:
            now = time.monotonic()
            for tenant in [t for t, c in self._claims.items() if c.until <= now and c.idle]:
                del self._claims[tenant]
            return list(self._claims.items())

    def _renew(self, tenant: str, claim: Claim) -> None:
        began = time.monotonic()
        keys = [self._keys.of(tenant, "lease"), self._keys.of(tenant, "wanted")]
        if claim.idle:
            if self._server.client.exists(keys[1]):
                with self._guard:
                    # somebody here may have come back meanwhile
                    if self._claims.get(tenant) is not claim or not claim.idle:
                        return
                    del self._claims[tenant]
                self._lost(tenant)
                self._give(tenant, claim)
            return
        answer = self._server.script(RENEW)(keys=keys, args=[claim.holder, int(self._ttl * 1000)])
        with self._guard:
            mine = self._claims.get(tenant) is claim
            if mine and answer[0]:
                claim.until = began + self._ttl * (1 - _MARGIN)
        if mine and not answer[0]:
            self.drop(tenant)

    def _give(self, tenant: str, claim: Claim) -> None:
        keys = [self._keys.of(tenant, "lease"), self._keys.of(tenant, "wanted")]
        self._server.script(RELEASE)(keys=keys, args=[claim.holder])
