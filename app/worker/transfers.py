"""Memories on their way out of the store and into it, by files that the API has made for them.

All of it happens in background threads: reading and writing a pool takes seconds, and other tenants go on.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from io import BufferedWriter
from typing import TYPE_CHECKING

from app.errors import FULL_SECONDS, InvalidMemoryFile, ServiceError, StoreFull, TenantExists, VersionConflict
from app.memory.codec import Pool, encode_snapshot
from app.memory.file import About, read_memory, write_memory
from app.memory.residency import Residency
from app.memory.stored import StoredPool
from app.messages import Exported, ExportTenant, ImportTenant, Reply, TenantInfo
from app.store.base import Manifest, Store
from app.worker.quotas import check_bytes

if TYPE_CHECKING:
    from app.worker.engine import Engine

TransferRequest = ExportTenant | ImportTenant
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(eq=False)
class Transfer:
    """``doomed`` is what it ends in as soon as its thread looks."""

    message: TransferRequest
    doomed: ServiceError | None = None


class Transfers:
    """Exports and imports under way."""

    def __init__(self, engine: Engine, residency: Residency, store: Store) -> None:
        self.engine, self.residency, self.store = engine, residency, store
        self._open: dict[str, Transfer] = {}

    def handle(self, message: TransferRequest) -> None:
        """Answers with a Reply or a Failed in the engine's outbox, later. Raises TenantErased."""
        self.engine.tenants.check_not_erasing(message.tenant)
        transfer = self._open[message.id] = Transfer(message)

        def work() -> Exported | TenantInfo:
            try:
                if isinstance(message, ExportTenant):
                    return self._export(message, transfer)
                return self._import(message, transfer)
            except OSError as error:
                if error.errno in _NO_ROOM:
                    raise StoreFull(
                        "there is no room for the file in the server's spool directory",
                        retry_after=FULL_SECONDS,
                    ) from error
                raise

        def done(result: object, error: ServiceError | None) -> None:
            del self._open[message.id]
            # an import that was made before its tenant's erasure is erased with it
            error = transfer.doomed or error
            if error is not None:
                self.engine.fail(message.id, error)
                return
            assert isinstance(result, Exported | TenantInfo)
            self.engine.emit(Reply(message.id, result))

        self.engine.background(message.tenant, work, done)

    def stop(self, tenant: str, error: ServiceError) -> int:
        """Has the tenant's transfers end in ``error``; how many there are."""
        mine = [t for t in self._open.values() if t.message.tenant == tenant]
        for transfer in mine:
            transfer.doomed = error
        return len(mine)

    # ------------------------------------------------------------ in background threads

    def _export(self, message: ExportTenant, transfer: Transfer) -> Exported:
        try:
            # no O_CREAT: a client that has gone has taken the file along
            descriptor = os.open(message.path, os.O_WRONLY | os.O_NOFOLLOW)
        except FileNotFoundError as error:
            raise ServiceError("nobody waits for this export any more") from error

        def stopped() -> bool:
            return transfer.doomed is not None or not os.fstat(descriptor).st_nlink

        with open(descriptor, "wb") as file:

            def write(manifest: Manifest) -> Exported:
                # once more, perhaps
                file.seek(0)
                file.truncate()
                written = self._write(file, manifest, message.texts, stopped)
                return Exported(message.tenant, manifest.version, written)

            return self.engine.tenants.settled(message.tenant, write)

    def _write(
        self, file: BufferedWriter, manifest: Manifest, texts: bool, stopped: Callable[[], bool]
    ) -> int:
        """The memory as ``manifest`` has it into ``file``, a layer at a time; how many bytes."""
        residency = self.residency
        with StoredPool(self.store, manifest, residency.own_pool) as pool:
            about = self._about(manifest, texts=texts)
            return write_memory(file, pool, about, residency.backbone.config, stopped=stopped)

    def _about(self, manifest: Manifest, *, texts: bool) -> About:
        records = tuple(self.store.history(manifest.tenant)) if texts else ()
        if records:
            now = self.engine.tenants.manifest(manifest.tenant)
            if (now.lineage, now.created) != (manifest.lineage, manifest.created):
                raise VersionConflict("the memory has changed meanwhile", retry_after=0.1)
        return About(
            manifest.fingerprint,
            manifest.seed,
            manifest.version,
            manifest.version > 0 or self.residency.backbone.weights.initialized,
            tuple(r for r in records if r.version <= manifest.version),
        )

    def _import(self, message: ImportTenant, transfer: Transfer) -> TenantInfo:
        residency, backbone = self.residency, self.residency.backbone
        if self.store.claim(message.tenant) is not None:
            raise TenantExists("this tenant exists already")
        with open(os.open(message.path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            about, pool = read_memory(
                file,
                os.fstat(file.fileno()).st_size,
                backbone.config,
                residency.fingerprint,
                stopped=lambda: transfer.doomed is not None,
            )
        snapshot = None
        if about.version:
            if pool.hidden.dtype != backbone.dtype:
                pool = Pool(pool.hidden.to(backbone.dtype), pool.born)
                if not bool(pool.hidden.isfinite().all()):
                    raise InvalidMemoryFile("the file's memory has numbers too large for this server's dtype")
            snapshot = encode_snapshot(pool)
            check_bytes(len(snapshot), message.most_bytes)
        else:
            residency.check_own_pool(pool)
            if about.initialized != backbone.weights.initialized:
                raise InvalidMemoryFile("initialized does not fit the file's version")
        manifest = self.store.create(
            Manifest(
                tenant=message.tenant,
                seed=about.seed,
                fingerprint=residency.fingerprint,
                created=time.time(),
                version=about.version,
            ),
            snapshot,
            about.records,
        )
        return self.engine.tenants.info(manifest, "cold")
