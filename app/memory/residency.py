"""Which tenants are resident, warm or cold, and the way from one to the other.

Memory is written through to the store, so that leaving the device saves nothing. Loading happens in a
background thread while other tenants' steps run; all decisions are made in the worker's loop, which alone
calls the public methods.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from app.errors import (
    FingerprintMismatch,
    InvalidMemoryFile,
    ServiceError,
    TenantExists,
    TenantNotFound,
    VersionConflict,
)
from app.memory.arena import Arena, Memory, View
from app.memory.codec import Pool, decode_block, decode_snapshot, encode_snapshot, replay
from app.model.backbone import Backbone
from app.model.forgetting import MAX_SEED
from app.store.base import Manifest, Store

Submit = Callable[[Callable[[], object], Callable[[object, ServiceError | None], None]], None]
"""Runs the first function in a background thread, then hands result and error to the second in the loop."""


def default_seed(tenant: str) -> int:
    """The seed of a tenant that was given none: drawn from its name, so that it is the same anywhere."""
    return int.from_bytes(hashlib.blake2b(tenant.encode(), digest_size=8).digest()) % MAX_SEED


@dataclass(frozen=True)
class Warm:
    """An evicted pool in host memory: ``parts`` are its tensors (see ``Pools.parts``), by slot; and its rank vector."""

    version: int
    lineage: int
    parts: tuple[Tensor, ...]
    rank: Tensor
    tail: Tensor | None
    born: Tensor

    @property
    def bytes(self) -> int:
        return sum(part.nbytes for part in self.parts) + (0 if self.tail is None else self.tail.nbytes)


class Residency:
    """Loads, evicts and looks up tenants' memories."""

    def __init__(
        self,
        backbone: Backbone,
        arena: Arena,
        store: Store,
        fingerprint: str,
        warm_bytes: int,
        submit: Submit,
    ) -> None:
        self.backbone, self.arena, self.store = backbone, arena, store
        self.fingerprint = fingerprint
        self._submit = submit
        self._resident: dict[str, Memory] = {}
        self._loading: set[str] = set()
        self._heating: set[str] = set()
        self._stale: set[str] = set()
        self._warm: OrderedDict[str, Warm] = OrderedDict()
        self._warm_bytes = self._warm_room = warm_bytes
        self.failures: dict[str, ServiceError] = {}
        self.loads = {"cold": 0, "warm": 0}
        self.evictions = 0
        config, weights = backbone.config, backbone.weights
        rows = config.num_layers if config.drop_memory_per_layer else 1
        self._base = Pool(weights.memory, torch.zeros(rows, config.pool_size, dtype=torch.int32))
        self._base_projected = backbone.project(weights.memory) if weights.initialized else None

    # ------------------------------------------------------------ looking

    def get(self, tenant: str) -> Memory | None:
        return self._resident.get(tenant)

    def tier(self, tenant: str) -> str:
        if tenant in self._resident:
            return "resident"
        return "warm" if tenant in self._warm else "cold"

    def resident(self, tenant: str) -> bool:
        """Whether an update can begin in the next step."""
        return tenant in self._resident and tenant not in self._stale

    def readable(self, tenant: str) -> bool:
        """Whether a generation can begin in the next step."""
        return self.resident(tenant) and self.arena.readable(self._resident[tenant])

    def moving(self, tenant: str) -> bool:
        """Whether a background thread is at work on the tenant's memory."""
        return tenant in self._loading or tenant in self._heating

    @property
    def counts(self) -> dict[str, int]:
        return {"resident": len(self._resident), "warm": len(self._warm), "loading": len(self._loading)}

    # ------------------------------------------------------------ coming

    def prepare(self, tenant: str, *, read: bool) -> bool:
        """Begins what ``tenant`` still needs: loading, and for a ``read`` a rotated copy.

        False if there is no room now because others hold all of it; the caller tries again at a later step.
        A failure lands in ``failures``.
        """
        if self.moving(tenant):
            return True
        memory = self._resident.get(tenant)
        if memory is not None and tenant in self._stale:
            if memory.pins:
                return False
            self.forget(tenant)
            memory = None
        if memory is None:
            return self._load(tenant)
        if read and not self.arena.readable(memory):
            return self._heat(memory)
        return True

    def _heat(self, memory: Memory) -> bool:
        hot = self.arena.take_hot()
        if hot is None:
            return False
        view = memory.view
        self._heating.add(memory.tenant)
        memory.pins += 1

        def done(_: object, error: ServiceError | None) -> None:
            self._heating.discard(memory.tenant)
            memory.pins -= 1
            self.arena.settle_hot(memory, view, hot)
            if error is not None:
                self.failures[memory.tenant] = error

        self._submit(lambda: self.arena.build_hot(memory.slot, view.rank, hot), done)
        return True

    def _load(self, tenant: str) -> bool:
        slot = self.arena.take_slot()
        leaving: Memory | None = None
        if slot is None:
            idle = [m for m in self._resident.values() if m.pins == 0]
            if not idle:
                return False
            leaving = min(idle, key=lambda m: m.used)
            del self._resident[leaving.tenant]
            self.arena.evict(leaving)
            self.evictions += 1
            slot = self.arena.take_slot()
            assert slot is not None
        warm = self._warm.pop(tenant, None)
        if warm is not None:
            self._warm_room += warm.bytes
        self._loading.add(tenant)
        place = slot

        def work() -> object:
            kept = self._keep_warm(leaving, place) if leaving is not None else None
            return kept, self._fetch(tenant, place, warm)

        def done(result: object, error: ServiceError | None) -> None:
            self._loading.discard(tenant)
            if error is not None:
                self.arena.give_slot(place)
                self.failures[tenant] = error
                return
            assert isinstance(result, tuple)
            kept, memory = result
            if leaving is not None and kept is not None:
                self._add_warm(leaving.tenant, kept)
            self._resident[tenant] = memory
            self.loads["cold" if warm is None else "warm"] += 1

        self._submit(work, done)
        return True

    def _fetch(self, tenant: str, slot: int, warm: Warm | None) -> Memory:
        manifest = self.store.load(tenant)
        if manifest is None:
            try:
                manifest = self.create(tenant, None)
            except TenantExists:
                manifest = self.store.load(tenant)
                assert manifest is not None
        self.check(manifest)
        if warm is not None and (warm.lineage, warm.version) == (manifest.lineage, manifest.version):
            for part, kept in zip(self.arena.pools.parts(slot), warm.parts, strict=True):
                part.copy_(kept)
            view = View(warm.version, warm.rank)
            return Memory(
                tenant,
                manifest.seed,
                slot,
                warm.version,
                warm.tail,
                warm.born,
                view,
                lineage=manifest.lineage,
            )
        if manifest.version == 0:
            rank = self._fill_base(slot)
            hidden, born = self._base.hidden, self._base.born
        else:
            manifest, pool = self.settled_pool(manifest)
            rank = self.arena.fill(slot, *self.backbone.project(pool.hidden))
            hidden, born = pool.hidden, pool.born
        tail: Tensor | None = None
        if manifest.version or self.backbone.weights.initialized:
            num_tokens = self.backbone.config.num_tokens
            tail = hidden[:, -num_tokens:].to(self.backbone.device, self.backbone.dtype, copy=True)
        view = View(manifest.version, rank)
        return Memory(
            tenant, manifest.seed, slot, manifest.version, tail, born, view, lineage=manifest.lineage
        )

    def _fill_base(self, slot: int) -> Tensor:
        if self._base_projected is None:
            config = self.backbone.config
            return torch.full((config.num_layers, config.pool_slots), -1, dtype=torch.int32)
        return self.arena.fill(slot, *self._base_projected)

    def check(self, manifest: Manifest) -> None:
        """Raises FingerprintMismatch if the pool was written by another model."""
        if manifest.fingerprint != self.fingerprint:
            raise FingerprintMismatch(
                "this tenant's memory was written by another model "
                f"({manifest.fingerprint[:12]}, this one is {self.fingerprint[:12]}); "
                "a rebuild writes it anew from its kept texts"
            )

    @property
    def own_pool(self) -> Pool:
        """The checkpoint's own pool, which every memory begins with: on the device, in its dtype."""
        return self._base

    def check_own_pool(self, pool: Pool) -> None:
        """Raises InvalidMemoryFile unless ``pool`` is the checkpoint's own, as far as its dtype can tell."""
        for own, found in zip(self._base.hidden, pool.hidden, strict=True):
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
        tenant = manifest.tenant
        base = self._base
        if manifest.snapshot is not None:
            base = decode_snapshot(self.store.read(tenant, manifest.snapshot.blob))
        blocks = ((b.version, decode_block(self.store.read(tenant, b.blob))) for b in manifest.blocks)
        return replay(base, blocks)

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
        return self.store.compact(manifest.tenant, manifest.version, snapshot, lineage=manifest.lineage)

    # ------------------------------------------------------------ going

    def _keep_warm(self, memory: Memory, slot: int) -> Warm | None:
        parts = self.arena.pools.parts(slot)
        if sum(part.nbytes for part in parts) > self._warm_bytes:
            return None
        kept = tuple(part.to("cpu", copy=True) for part in parts)
        return Warm(memory.version, memory.lineage, kept, memory.view.rank, memory.tail, memory.born)

    def _add_warm(self, tenant: str, warm: Warm) -> None:
        if tenant in self._warm or tenant in self._resident or tenant in self._loading:
            return
        while self._warm and self._warm_room < warm.bytes:
            _, oldest = self._warm.popitem(last=False)
            self._warm_room += oldest.bytes
        if self._warm_room >= warm.bytes:
            self._warm[tenant] = warm
            self._warm_room -= warm.bytes

    def distrust(self, tenant: str) -> None:
        """Has the memory read again from the store before anything new uses it: a commit's outcome is unknown."""
        self._stale.add(tenant)

    def renew(self, tenant: str) -> None:
        """The stored memory is another now: nothing new reads the one that is here, warm or on its way.

        Those who read it go on.
        """
        if tenant in self._resident or tenant in self._loading:
            self.distrust(tenant)
        warm = self._warm.pop(tenant, None)
        if warm is not None:
            self._warm_room += warm.bytes

    def forget(self, tenant: str) -> None:
        """Drops an erased or distrusted tenant from every tier. The caller has seen to it that nobody holds it."""
        warm = self._warm.pop(tenant, None)
        if warm is not None:
            self._warm_room += warm.bytes
        memory = self._resident.pop(tenant, None)
        if memory is not None:
            self.arena.evict(memory)
        self._stale.discard(tenant)
        self.failures.pop(tenant, None)
