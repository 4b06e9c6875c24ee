"""The manifests in Redis: claimed, remembered while the claim holds, and swapped by one script."""

from __future__ import annotations

import threading

from app.errors import StoreFailed, TenantExists, VersionConflict
from app.store.base import BlobRef, Manifest
from app.store.home import tenant_id
from app.store.lineages import dropped
from app.store.parts import quarantined
from app.store.records import Damaged, seal, unseal_manifest
from app.store.redis_blobs import RedisBlobs
from app.store.redis_leases import Keys, Leases
from app.store.redis_scripts import SWAP
from app.store.redis_server import Server

_MARK = 32


class RedisManifests:
    """All methods but ``cached`` are called under the tenant's lock."""

    def __init__(self, server: Server, keys: Keys, blobs: RedisBlobs) -> None:
        self._server, self._keys, self._blobs = server, keys, blobs
        self._guard = threading.Lock()
        self._cache: dict[str, Manifest] = {}
        self.leases = Leases(server, keys, self.forget)

    # ------------------------------------------------------------ reading

    def cached(self, tenant: str) -> Manifest | None:
        if self.leases.held(tenant) is None:
            return None
        with self._guard:
            return self._cache.get(tenant)

    def forget(self, tenant: str) -> None:
        """What is remembered of the tenant may be out of date."""
        with self._guard:
            self._cache.pop(tenant, None)

    def claim(self, tenant: str) -> Manifest | None:
        """The manifest, this server being the only writer. Raises TenantElsewhere, TenantQuarantined, StoreFailed."""
        self.leases.use(tenant)
        manifest = self.cached(tenant)
        if manifest is not None:
            return manifest
        # nobody may believe it again because the new claim holds
        self.forget(tenant)
        found = self.leases.take(tenant)
        if found.erasing:
            return None
        if found.manifest is None:
            if found.listed:
                raise quarantined("its manifest is missing", f"{tenant_id(tenant)}/manifest")
            return None
        manifest = self._opened(found.manifest, tenant)
        # what another server began and did not end is this one's to remove
        self._blobs.sweep(manifest)
        with self._guard:
            self._cache[tenant] = manifest
        return manifest

    def look(self, tenant: str) -> Manifest | None:
        """The manifest as it is now, whoever may write it. Raises TenantQuarantined, StoreFailed."""
        manifest = self.cached(tenant)
        if manifest is not None:
            return manifest
        keys = [self._keys.of(tenant, "manifest"), self._keys.of(tenant, "erasing")]

        def ask() -> list[object]:
            pipeline = self._server.client.pipeline(transaction=True)
            pipeline.get(keys[0])
            pipeline.exists(keys[1])
            pipeline.zscore(self._keys.index, tenant)
            answers: list[object] = pipeline.execute()
            return answers

        data, erasing, listed = self._server.again("reading a manifest", ask)
        if isinstance(data, bytes):
            return self._opened(data, tenant)
        if listed is not None and not erasing:
            raise quarantined("its manifest is missing", f"{tenant_id(tenant)}/manifest")
        return None

    @staticmethod
    def _opened(data: bytes, tenant: str) -> Manifest:
        try:
            return unseal_manifest(data, tenant)
        except Damaged as error:
            raise quarantined(
                f"its manifest is damaged ({error})", f"{tenant_id(tenant)}/manifest"
            ) from error

    # ------------------------------------------------------------ writing

    def doubt(self, tenant: str) -> None:
        """Nobody can tell whether a change was made, or still will be: the next claim asks, and fences it off."""
        self.leases.drop(tenant)

    def begin(self, manifest: Manifest) -> Manifest:
        """Makes a tenant of this manifest. Raises TenantExists, TenantElsewhere, StoreFull, StoreFailed."""
        self._put(manifest.tenant, "", manifest)
        return manifest

    def swap(self, old: Manifest, new: Manifest, fresh: list[BlobRef]) -> Manifest:
        """Replaces ``old`` durably by ``new``, which names the blobs ``fresh`` besides, and returns it.

        Then the blobs are removed that only ``old`` named. Raises VersionConflict, StoreFull or StoreFailed if ``old``
        still holds (``fresh`` are removed then), StoreFailed if nobody can tell; the next claim fences that off.
        """
        try:
            self._put(new.tenant, seal(old)[:_MARK].decode(), new)
        except StoreFailed:
            raise
        except Exception:
            self._blobs.discard(new.tenant, [ref.name for ref in fresh])
            raise
        self._blobs.discard(new.tenant, dropped(old, new))
        return new

    def _put(self, tenant: str, mark: str, manifest: Manifest) -> None:
        lease = self.leases.held(tenant)
        if lease is None:
            self.forget(tenant)
            raise VersionConflict("another server may have changed the memory meanwhile", retry_after=0.1)
        names = [self._keys.of(tenant, "manifest"), self._keys.of(tenant, "lease"), self._keys.index]
        keys = [*names, self._keys.of(tenant, "erasing")]
        arguments = [lease, mark, seal(manifest), tenant]
        try:
            answer = self._server.once(
                "writing a manifest", lambda: self._server.settled(SWAP, keys, arguments)
            )
        except StoreFailed:
            self.doubt(tenant)
            raise
        if answer == b"exists":
            raise TenantExists("this tenant exists already")
        if answer != b"ok":
            self.leases.drop(tenant)
            raise VersionConflict("another server has changed the memory meanwhile", retry_after=0.1)
        with self._guard:
            self._cache[tenant] = manifest
