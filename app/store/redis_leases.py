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

from app.errors import TenantElsewhere
from app.store.home import tenant_id
from app.store.redis_scripts import CLAIM, RELEASE, RENEW
from app.store.redis_server import Server

# a lease counts as held until this share of it is left, for clocks and networks that are late
_MARGIN = 0.25
# so often within a lease's time claims are renewed, and those asked for given up
_ROUNDS = 5


@dataclass
class Claim:
    """``until`` is monotonic time; ``lease`` is what fences; ``idle`` when nobody here needs the tenant."""

    lease: bytes
    until: float
    idle: bool = False


@dataclass(frozen=True)
class Claimed:
    """What the server said at a claim: ``manifest`` as it lies there, and if the tenant is listed or half erased."""

    manifest: bytes | None
    listed: bool
    erasing: bool


class Keys:
    """Names of a tenant's keys: the tenant's id is a hash of its name, which itself never reaches a key."""

    def __init__(self, prefix: str) -> None:
        self.index = f"{prefix}:tenants"
        self.format = f"{prefix}:format"
        self.key = f"{prefix}:key"
        self.fence = f"{prefix}:fence"
        self.making = f"{prefix}:making"
        self._prefix = prefix

    def of(self, tenant: str, what: str) -> str:
        return f"{self._prefix}:{{{tenant_id(tenant)}}}:{what}"


class Leases:
    """``lost`` is told of a tenant whose claim is over, so that nothing remembered of it is believed."""

    def __init__(self, server: Server, keys: Keys, lost: Callable[[str], None]) -> None:
        self._server, self._keys, self._lost = server, keys, lost
        self._name = secrets.token_hex(8)
        self._ttl = server.options.lease
        self._milliseconds = int(self._ttl * 1000)
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

    def held(self, tenant: str) -> bytes | None:
        """The claim's lease while it surely holds: ``<number>:<server>``."""
        with self._guard:
            claim = self._claims.get(tenant)
            return claim.lease if claim is not None and time.monotonic() < claim.until else None

    def take(self, tenant: str) -> Claimed:
        """Claims the tenant, or claims it again. After ``drop`` it has another number, which fences off what this
        server itself may have under way.

        Raises TenantElsewhere, StoreFull, StoreFailed.
        """
        began = time.monotonic()
        with self._guard:
            # a lease that is ours but not known here was dropped, or is being given up
            anew = tenant not in self._claims
        lease, wanted, manifest, erasing = (
            self._keys.of(tenant, what) for what in ("lease", "wanted", "manifest", "erasing")
        )
        keys = [lease, self._keys.fence, wanted, manifest, erasing, self._keys.index]
        arguments = [self._name, self._milliseconds, tenant, int(anew)]
        script = self._server.although_full(CLAIM)
        answer = self._server.again("claiming a tenant", lambda: self._server.script(script, keys, arguments))
        if not answer[0]:
            # an idle holder gives way in its next round
            left = min(max(int(answer[1]), 0) / 1000, self._ttl / _ROUNDS)
            raise TenantElsewhere(
                "another server is at work for this tenant", retry_after=round(left + 0.05, 2)
            )
        _, mark, found, listed, half_erased = answer
        if found is not None and self._server.waits:
            # what another server wrote, or this one without learning of it, may not be on the disk yet
            still = self._server.again(
                "claiming a tenant",
                lambda: self._server.settled(RENEW, [lease], [mark, self._milliseconds]),
            )
            if not still:
                raise TenantElsewhere("the claim lapsed while the store was waited for", retry_after=1.0)
        with self._guard:
            self._claims[tenant] = Claim(mark, began + self._ttl * (1 - _MARGIN))
        return Claimed(found, bool(listed), bool(half_erased))

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
        while not self._stop.wait(self._ttl / _ROUNDS):
            try:
                self._round()
            except (redis.RedisError, OSError):
                # a server that cannot be reached ends the claims by their time
                continue

    def _round(self) -> None:
        """Renews every claim in use, and gives up those that are idle and asked for; one trip for all."""
        claims, began = self._standing(), time.monotonic()
        if not claims:
            return
        pipeline = self._server.client.pipeline(transaction=False)
        for tenant, claim, idle in claims:
            if idle:
                pipeline.exists(self._keys.of(tenant, "wanted"))
            else:
                lease = self._keys.of(tenant, "lease")
                self._server.script(RENEW, [lease], [claim.lease, self._milliseconds], pipeline)
        answers = pipeline.execute(raise_on_error=False)
        for (tenant, claim, idle), answer in zip(claims, answers, strict=True):
            if isinstance(answer, Exception):
                continue
            if not idle:
                self._renewed(tenant, claim, bool(answer), began)
            elif answer:
                self._give_way(tenant, claim)

    def _standing(self) -> list[tuple[str, Claim, bool]]:
        """All claims, and whether they are idle; without those that are idle and over."""
        with self._guard:
            now = time.monotonic()
            over = [tenant for tenant, claim in self._claims.items() if claim.until <= now and claim.idle]
            for tenant in over:
                del self._claims[tenant]
            claims = [(tenant, claim, claim.idle) for tenant, claim in self._claims.items()]
        for tenant in over:
            self._lost(tenant)
        return claims

    def _renewed(self, tenant: str, claim: Claim, holds: bool, began: float) -> None:
        with self._guard:
            if self._claims.get(tenant) is not claim:
                return
            if holds:
                claim.until = began + self._ttl * (1 - _MARGIN)
        if not holds:
            self.drop(tenant)

    def _give_way(self, tenant: str, claim: Claim) -> None:
        with self._guard:
            # somebody here may have come back meanwhile
            if self._claims.get(tenant) is not claim or not claim.idle:
                return
            del self._claims[tenant]
        self._lost(tenant)
        self._give(tenant, claim)

    def _give(self, tenant: str, claim: Claim) -> None:
        keys = [self._keys.of(tenant, "lease"), self._keys.of(tenant, "wanted")]
        self._server.script(RELEASE, keys, [claim.lease])
