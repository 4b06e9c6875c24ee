"""The store in Redis or Valkey: several servers may share it, one at a time writing a tenant.

Keys of a tenant, under ``<prefix>:{<id>}:``, the id being a hash of its name:

    manifest                 what is true: sealed as on a disk
    blob:<name>:<n>, blobs   chunks of blobs, and the hash of all there may be
    lease, wanted            who may write, and that another would, see ``redis_leases``; they lapse
    erasing                  the manifest of a tenant being erased

and for all tenants ``<prefix>:tenants`` (a sorted set of names), ``:fence`` (the last claim's number), ``:making``
(a set of those whose first blobs are being written), ``:format`` and ``:key``. Blobs are written first,
then one script swaps the manifest. With an append-only file that is synced always, also while it is written anew, Redis
answers when the change is on its disk; otherwise the store waits for that (WAITAOF) before it acknowledges anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from app.errors import (
    ServiceError,
    StoreFailed,
    TenantElsewhere,
    TenantExists,
    TenantNotFound,
    TenantQuarantined,
)
from app.store.base import BlobRef, BlockRecord, Manifest, Receipt
from app.store.home import STORE_FORMAT
from app.store.lineages import Copy
from app.store.locks import TenantLocks
from app.store.operations import Operations
from app.store.parts import Place
from app.store.records import Damaged, seal, unseal
from app.store.redis_blobs import RedisBlobs
from app.store.redis_leases import Keys
from app.store.redis_manifests import RedisManifests
from app.store.redis_scripts import ERASE, ERASED
from app.store.redis_server import RedisOptions, Server
from app.store.texts import Texts

_T = TypeVar("_T")


@dataclass(frozen=True)
class _Target:
    """Where a new tenant's blobs are put: under its own name, before it exists. ``note`` is called before the first."""

    blobs: RedisBlobs
    tenant: str
    note: Callable[[], object]
    put_names: list[str] = field(default_factory=list)

    def _begin(self, name: str) -> None:
        if not self.put_names:
            self.note()
        self.put_names.append(name)

    def put(self, name: str, data: bytes) -> BlobRef:
        self._begin(name)
        return self.blobs.put(self.tenant, name, data)

    def share(self, tenant: str, copy: Copy) -> None:
        self._begin(copy[1].name)
        self.blobs.share(tenant, copy, self.tenant)


class RedisStore(Operations):
    """See ``app.store.base.Store``. Raises StoreFailed if the server is none to keep memories on, ValueError for a key
    of another length than 32 bytes or a negative limit."""

    def __init__(
        self,
        options: RedisOptions,
        *,
        keep_text: bool = True,
        text_key: bytes | None = None,
        history_limit: int = 2000,
    ) -> None:
        if history_limit < 0:
            raise ValueError("history_limit is at least 0")
        texts = Texts(keep_text, text_key)
        self._keys = Keys(options.prefix)
        self._server = Server(options)
        try:
            self._check_format()
            self._check_key(texts)
        except BaseException:
            self._server.close()
            raise
        self._redis_blobs = RedisBlobs(self._server, self._keys)
        self._redis_manifests = RedisManifests(self._server, self._keys, self._redis_blobs)
        super().__init__(self._redis_blobs, self._redis_manifests, texts, TenantLocks(), history_limit)
        self._finish_erasures()
        self._finish_makings()

    def close(self) -> None:
        """Waits for what is under way, refuses whatever comes later, and gives up every claim."""
        self._locks.close()
        self._redis_manifests.leases.close()
        self._server.close()

    # ------------------------------------------------------------ opening

    def _check_format(self) -> None:
        client = self._server.client
        ours = STORE_FORMAT.encode()
        found = self._server.again("opening the store", lambda: client.get(self._keys.format))
        if found is None:
            self._server.again("opening the store", lambda: client.setnx(self._keys.format, ours))
            found = self._server.again("opening the store", lambda: client.get(self._keys.format)) or b""
        if found != ours:
            shown = found[:64].decode("utf-8", "replace")
            raise StoreFailed(f"the store has the format {shown!r}, not {STORE_FORMAT!r}")

    def _check_key(self, texts: Texts) -> None:
        client, key = self._server.client, self._keys.key
        proof = self._server.again("opening the store", lambda: client.get(key))
        if proof is None and texts.encrypting:
            made = seal(texts.proof())
            self._server.again("opening the store", lambda: client.setnx(key, made))
            proof = self._server.again("opening the store", lambda: client.get(key))
        if proof is None:
            return
        if not texts.encrypting:
            if texts.keep:
                raise StoreFailed(
                    "the store holds encrypted texts: give it the text key, or switch keeping texts off"
                )
            return
        try:
            proves = texts.proves(unseal(proof, str))
        except Damaged as error:
            raise StoreFailed(
                f"the key {key} is damaged; delete it to have it made again from the text key"
            ) from error
        if not proves:
            raise StoreFailed("this is not the text key that the store was written with")

    def _finish_erasures(self) -> None:
        """What another server began to erase, and did not live to end."""
        for tenant in self._listed(erasing=True):
            with suppress(ServiceError):
                self.erase(tenant)
            self.release(tenant)

    def _finish_makings(self) -> None:
        """Removes the blobs of tenants that some server began to make, and did not live to."""
        client = self._server.client
        for name in self._server.again("opening the store", lambda: client.smembers(self._keys.making)):
            tenant = name.decode()
            with suppress(ServiceError), self._locks.holding(tenant):
                if self._redis_manifests.claim(tenant) is None:
                    self._finish_own(tenant)
                self._made(tenant)
            self.release(tenant)

    def _made(self, tenant: str) -> None:
        self._server.again("making a tenant", lambda: self._server.client.srem(self._keys.making, tenant))

    # ------------------------------------------------------------ claims

    def claim(self, tenant: str) -> Manifest | None:
        manifest = self._redis_manifests.cached(tenant)
        if manifest is not None:
            self._redis_manifests.leases.use(tenant)
            return manifest
        with self._locks.holding(tenant):
            return self._redis_manifests.claim(tenant)

    def claimed(self, tenant: str) -> bytes | None:
        lease = self._redis_manifests.leases.held(tenant)
        if lease is not None:
            self._redis_manifests.leases.use(tenant)
        return lease

    def holds(self, tenant: str) -> bool:
        return self._redis_manifests.leases.held(tenant) is not None

    def release(self, tenant: str) -> None:
        self._redis_manifests.leases.release(tenant)

    # ------------------------------------------------------------ reading

    def _listed(self, only: Sequence[str] | None = None, *, erasing: bool = False) -> list[str]:
        client = self._server.client
        names = sorted(self._indexed(["*"] if only is None else only))

        def ask() -> list[int]:
            pipeline = client.pipeline(transaction=False)
            for name in names:
                pipeline.exists(self._keys.of(name, "erasing"))
            answers: list[int] = pipeline.execute()
            return answers

        found = self._server.again("listing the tenants", ask) if names else []
        return [name for name, going in zip(names, found, strict=True) if bool(going) == erasing]

    def _indexed(self, only: Sequence[str]) -> set[str]:
        """The names in the index that ``only`` means, as ``tenants`` has it."""
        beginnings = [wanted[:-1].encode() for wanted in only if wanted.endswith("*")]
        names = [wanted for wanted in only if not wanted.endswith("*")]

        def ask() -> list[Any]:
            pipeline = self._server.client.pipeline(transaction=False)
            for beginning in beginnings:
                # no name has this byte: behind all that begin so
                pipeline.zrangebylex(self._keys.index, b"[" + beginning, b"(" + beginning + b"\xff")
            for name in names:
                pipeline.zscore(self._keys.index, name)
            answers: list[Any] = pipeline.execute()
            return answers

        found = self._server.again("listing", ask)
        begun = {name.decode() for some in found[: len(beginnings)] for name in some}
        there = zip(names, found[len(beginnings) :], strict=True)
        return begun | {name for name, score in there if score is not None}

    def tenants(self, only: Sequence[str] | None = None) -> Iterator[str]:
        return iter(self._listed(only))

    def load(self, tenant: str) -> Manifest | None:
        """The manifest as it is now, whichever server may write it."""
        self._locks.check()
        return self._redis_manifests.look(tenant)

    def history(self, tenant: str) -> list[BlockRecord]:
        """As ``Store.history``; looking on claims nothing, so that another server may be at work meanwhile."""
        return self._looking_on(
            tenant, lambda manifest: self._histories.readable(self._histories.records(manifest), tenant)
        )

    def times(self, tenant: str) -> list[float]:
        return self._looking_on(tenant, self._histories.times)

    def _looking_on(self, tenant: str, read: Callable[[Manifest], list[_T]]) -> list[_T]:
        while True:
            manifest = self.load(tenant)
            if manifest is None:
                raise TenantNotFound("there is no such tenant")
            try:
                return read(manifest)
            except TenantQuarantined:
                # its archive may have been replaced since
                if self.load(tenant) == manifest:
                    raise

    def _look(self, tenant: str) -> Manifest | None:
        return self._redis_manifests.look(tenant)

    def _load(self, tenant: str) -> Manifest | None:
        return self._redis_manifests.claim(tenant)

    # ------------------------------------------------------------ making and erasing tenants

    def _make(self, tenant: str, fill: Callable[[Place], Manifest]) -> Manifest:
        if self._redis_manifests.claim(tenant) is not None:
            raise TenantExists("this tenant exists already")
        self._finish_own(tenant)
        client, making = self._server.client, self._keys.making
        place = _Target(
            self._redis_blobs,
            tenant,
            lambda: self._server.again("making a tenant", lambda: client.sadd(making, tenant)),
        )
        try:
            made = self._redis_manifests.begin(fill(place))
        except StoreFailed:
            # nobody may know whether the tenant is there: the next to claim or open sweeps
            raise
        except ServiceError:
            self._redis_blobs.discard(tenant, place.put_names)
            raise
        if place.put_names:
            with suppress(ServiceError):
                self._made(tenant)
        return made

    def _finish_own(self, tenant: str) -> None:
        """Ends an erasure of this name that somebody began; the claim is held."""
        held = self._redis_blobs.held(tenant)
        client = self._server.client
        going = self._server.again("reading", lambda: client.exists(self._keys.of(tenant, "erasing")))
        if held or going:
            self._redis_blobs.remove(tenant, held)
            self._end_erasure(tenant)
            self._redis_manifests.leases.take(tenant)

    def erase(self, tenant: str) -> Receipt | None:
        """Raises StoreFull or StoreFailed if anything may be left; asking again goes on from there."""
        with self._locks.holding(tenant):
            manifest = None
            with suppress(TenantQuarantined):
                manifest = self._redis_manifests.claim(tenant)
            if self._redis_manifests.leases.held(tenant) is None:
                # a quarantined tenant is claimed as well
                self._redis_manifests.leases.take(tenant)
            held = self._redis_blobs.held(tenant)
            if not self._out_of_reach(tenant) and not held:
                return None
            size = sum(held.values()) + (0 if manifest is None else len(seal(manifest)))
            versions = [int(name.partition("-")[0]) for name in held]
            version = manifest.version if manifest is not None else max(versions, default=0)
            try:
                self._redis_blobs.remove(tenant, held)
                self._end_erasure(tenant)
            except StoreFailed as error:
                raise StoreFailed(
                    "the tenant is out of reach, but not all of it is deleted yet: erase it once more"
                ) from error
            return Receipt(tenant, version, len(held), size)

    def _held_by_us(self, tenant: str) -> bytes:
        lease = self._redis_manifests.leases.held(tenant)
        if lease is None:
            raise TenantElsewhere("another server is at work for this tenant", retry_after=1.0)
        return lease

    def _out_of_reach(self, tenant: str) -> bool:
        """Durably hides the tenant from every reader; False if there is none."""
        keys = [self._keys.of(tenant, what) for what in ("manifest", "lease", "erasing")]
        answer = self._durably("erasing a tenant", ERASE, [*keys, self._keys.index], tenant)
        self._redis_manifests.forget(tenant)
        return answer == b"ok"

    def _end_erasure(self, tenant: str) -> None:
        what = ("erasing", "blobs", "lease", "wanted", "manifest")
        erasing, *others = (self._keys.of(tenant, each) for each in what)
        self._durably("erasing a tenant", ERASED, [erasing, self._keys.index, *others], tenant)
        self._redis_manifests.leases.drop(tenant)

    def _durably(self, doing: str, source: str, keys: list[str], tenant: str) -> bytes:
        lease = self._held_by_us(tenant)
        try:
            answer: bytes = self._server.again(
                doing, lambda: self._server.settled(source, keys, [lease, tenant])
            )
        except StoreFailed:
            self._redis_manifests.doubt(tenant)
            raise
        if answer in (b"fenced", b"changed"):
            self._redis_manifests.leases.drop(tenant)
            raise TenantElsewhere("another server is at work for this tenant", retry_after=1.0)
        return answer
