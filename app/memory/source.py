"""Tenants' memories as the store has them: created, read whole, compacted. Runs in background threads."""

from __future__ import annotations

import hashlib
import time

import torch

from app.errors import FingerprintMismatch, InvalidMemoryFile, TenantNotFound, VersionConflict
from app.memory.codec import Block, Pool, decode_block, encode_snapshot
from app.memory.replay import Gathering, replay
from app.model.backbone import Backbone
from app.model.forgetting import MAX_SEED
from app.store.base import BlobRef, Manifest, Store


def default_seed(tenant: str) -> int:
    """The seed of a tenant that was given none: drawn from its name, so that it is the same anywhere."""
    return int.from_bytes(hashlib.blake2b(tenant.encode(), digest_size=8).digest()) % MAX_SEED


class Source:
    """The store, seen by a model: ``own_pool`` is the checkpoint's, which every memory begins with (on the host)."""

    def __init__(self, backbone: Backbone, store: Store, fingerprint: str) -> None:
        self.store, self.fingerprint = store, fingerprint
        config, weights = backbone.config, backbone.weights
        rows = config.num_layers if config.drop_memory_per_layer else 1
        self.own_pool = Pool(weights.memory, torch.zeros(rows, config.pool_size, dtype=torch.int32))

    def check(self, manifest: Manifest) -> None:
        """Raises FingerprintMismatch if the pool was written by another model."""
        if manifest.fingerprint != self.fingerprint:
            raise FingerprintMismatch(
                "this tenant's memory was written by another model "
                f"({manifest.fingerprint[:12]}, this one is {self.fingerprint[:12]}); "
                "a rebuild writes it anew from its kept texts"
            )

    def check_own_pool(self, pool: Pool) -> None:
        """Raises InvalidMemoryFile unless ``pool`` is the checkpoint's own, as far as its dtype can tell."""
        for own, found in zip(self.own_pool.hidden, pool.hidden, strict=True):
            here = own.cpu()
            if not torch.equal(here.to(found.dtype), found) and not torch.equal(here, found.to(here.dtype)):
                raise InvalidMemoryFile("a memory at version 0 is the model's own, and the file's is not")

    def create(self, tenant: str, seed: int | None) -> Manifest:
        """Makes the tenant durable at version 0. Runs in any thread. Raises as Store.create."""
        return self.store.create(
            Manifest(
                tenant=tenant,
                seed=default_seed(tenant) if seed is None else seed,
                fingerprint=self.fingerprint,
                created=time.time(),
            )
        )

    def pool(self, manifest: Manifest) -> Pool:
        """The whole pool at the manifest's version, read from the store. Runs in any thread."""
        if manifest.snapshot is None:
            return replay(self.own_pool, self.blocks(manifest))
        blob = manifest.snapshot.blob
        # the blocks first, because they say what is left of the snapshot
        blocks = self.blocks(manifest, blob)
        gathering = Gathering(self.own_pool.hidden.shape, blob.size, blocks)
        with self.store.reader(manifest.tenant, blob) as reader:
            reader.pour(gathering.feed)
        return gathering.pool()

    def blocks(self, manifest: Manifest, *then: BlobRef) -> list[tuple[int, Block]]:
        """(version, block) of each block that the manifest names; ``then`` is read next. Raises as ``Store.read``."""
        # a disk that is asked for one file after another waits for each
        self.store.expect(manifest.tenant, [*(block.blob for block in manifest.blocks), *then])
        return [(b.version, decode_block(self.store.read(manifest.tenant, b.blob))) for b in manifest.blocks]

    def settled_pool(self, manifest: Manifest) -> tuple[Manifest, Pool]:
        """As ``pool``, while compactions go on: one that took a blob away has left a newer manifest."""
        while True:
            try:
                return manifest, self.pool(manifest)
            except VersionConflict:
                newer = self.store.load(manifest.tenant)
                if newer is None:
                    raise TenantNotFound("there is no such tenant") from None
                if newer == manifest:
                    raise
                manifest = newer

    def compact(self, manifest: Manifest) -> Manifest:
        """Writes a snapshot of the pool at the manifest's version in place of its blocks. Any thread."""
        snapshot = encode_snapshot(self.pool(manifest))
        return self.store.compact(
            manifest.tenant, manifest.version, snapshot, lineage=manifest.lineage, created=manifest.created
        )
