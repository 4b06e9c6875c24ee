"""Requests about tenants themselves: create, list, look, erase, what the memory holds and its history."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from torch import Tensor

from app import logs
from app.errors import InvalidRequest, ServiceError, TenantErased, TenantNotFound, VersionConflict
from app.memory.residency import Born, Erasure, Residency
from app.memory.stored import StoredPool
from app.messages import (
    CreateTenant,
    Erased,
    EraseTenant,
    Exported,
    GetHistory,
    GetMemory,
    GetTenant,
    History,
    HistoryItem,
    ListTenants,
    MemoryView,
    Reply,
    TenantInfo,
    TenantList,
    Texts,
)
from app.model.forgetting import MAX_SEED, surviving
from app.store.base import Manifest, Receipt, Store, content
from app.worker import quotas

if TYPE_CHECKING:
    from app.worker.engine import Engine

T = TypeVar("T")
TenantRequest = CreateTenant | ListTenants | GetTenant | EraseTenant | GetMemory | GetHistory
Body = TenantInfo | TenantList | Erased | Exported | Texts | MemoryView | History


@dataclass
class _Erasure:
    message: EraseTenant
    cancelled: int
    begun: bool = False


class Tenants:
    """Answers tenant requests in background threads; erasures wait until the tenant is quiet."""

    def __init__(self, engine: Engine, residency: Residency, store: Store) -> None:
        self.engine, self.residency, self.store = engine, residency, store
        self._erasures: dict[str, _Erasure] = {}

    def check_not_erasing(self, tenant: str) -> None:
        """Raises TenantErased while an erasure of the tenant is under way."""
        if tenant in self._erasures:
            raise TenantErased("the tenant is being erased", retry_after=1.0)

    def handle(self, message: TenantRequest) -> None:
        """Answers with a Reply or a Failed in the engine's outbox, now or later."""
        work: Callable[[], Body]
        if isinstance(message, ListTenants):
            work = lambda: self._list(message)  # noqa: E731
            self.tell(message.id, "", work)
            return
        self.check_not_erasing(message.tenant)
        if isinstance(message, EraseTenant):
            self.engine.erase(message)
            return
        if isinstance(message, CreateTenant):
            self.answer(message.id, message.tenant, lambda: self._create(message))
            return
        if isinstance(message, GetTenant):
            tier = self.residency.tier(message.tenant)
            work = lambda: self.info(self.manifest(message.tenant), tier)  # noqa: E731
        elif isinstance(message, GetMemory):
            work = self._memory(message.tenant)
        else:
            work = self._history(message)
        self.tell(message.id, message.tenant, work)

    def tell(self, request_id: str, tenant: str, work: Callable[[], Body]) -> None:
        """As ``answer``, for what only looks: tenants take turns."""
        self.engine.look(tenant, work, self._answering(request_id))

    def answer(self, request_id: str, tenant: str, work: Callable[[], Body], *others: str) -> None:
        """Answers with what ``work`` returns in a thread; neither ``tenant`` nor ``others`` is erased meanwhile."""
        self.engine.background(tenant, work, self._answering(request_id), *others)

    def _answering(self, request_id: str) -> Callable[[object, ServiceError | None], None]:
        def done(result: object, error: ServiceError | None) -> None:
            if error is not None:
                self.engine.fail(request_id, error)
            else:
                assert isinstance(result, Body)
                self.engine.emit(Reply(request_id, result))

        return done

    # ------------------------------------------------------------ in background threads

    def manifest(self, tenant: str) -> Manifest:
        """The tenant's manifest. Raises TenantNotFound and as Store.load."""
        manifest = self.store.load(tenant)
        if manifest is None:
            raise TenantNotFound("there is no such tenant")
        return manifest

    def settled(self, tenant: str, use: Callable[[Manifest], T]) -> T:
        """What ``use`` makes of the tenant's manifest, while compactions go on: one that took a blob away has left a
        newer manifest. Raises TenantNotFound, FingerprintMismatch, VersionConflict and what ``use`` does."""
        manifest = self.manifest(tenant)
        while True:
            self.residency.check(manifest)
            try:
                return use(manifest)
            except VersionConflict:
                newer = self.manifest(tenant)
                if newer == manifest:
                    raise
                manifest = newer

    def _create(self, message: CreateTenant) -> Body:
        if message.seed is not None and not 0 <= message.seed < MAX_SEED:
            raise InvalidRequest("a seed is at least 0 and below 2^40", param="seed")
        return self.info(self.residency.create(message.tenant, message.seed), "cold")

    def info(self, manifest: Manifest, tier: str) -> TenantInfo:
        """What is told of a tenant. Raises as Store.history."""
        last = list(manifest.blocks[-1:])
        if not last and manifest.archive:
            last = self.store.history(manifest.tenant)[-1:]
        return TenantInfo(
            tenant=manifest.tenant,
            seed=manifest.seed,
            memory_version=manifest.version,
            created=manifest.created,
            updated=last[0].time if last else manifest.created,
            bytes=self.store.usage(manifest.tenant),
            tier=tier,
            lineage=manifest.lineage,
        )

    def _list(self, message: ListTenants) -> Body:
        names = list(self.store.tenants(message.only))
        start = bisect_right(names, message.after) if message.after else 0
        page = names[start : start + message.limit]
        more = start + len(page) < len(names)
        return TenantList(page, page[-1] if more and page else None, len(names))

    def _memory(self, tenant: str) -> Callable[[], Body]:
        config = self.residency.backbone.config
        # one that a rollback has left behind is still read by those who began before it
        memory = self.residency.get(tenant) if self.residency.resident(tenant) else None
        here = None if memory is None else (memory.version, memory.born)

        def work() -> Body:
            version, born = here if here is not None else self.settled(tenant, self._born)
            return MemoryView(tenant, version, config.num_blocks, config.num_tokens, born.tolist())

        return work

    def _born(self, manifest: Manifest) -> tuple[int, Tensor]:
        """The version, and which update wrote each token: in the memory of a few layers, whoever asks how often."""
        with StoredPool(self.store, manifest, self.residency.own_pool) as pool:
            for _ in pool.layers():
                pass
            return manifest.version, pool.born

    def _history(self, message: GetHistory) -> Callable[[], Body]:
        here = self.residency.born(message.tenant)
        return lambda: self._told(message, here)

    def _told(self, message: GetHistory, here: Born | None) -> History:
        manifest = self.manifest(message.tenant)
        # what was committed since the manifest was read is of a later version than is told here
        records = [r for r in self.store.history(message.tenant) if r.version <= manifest.version]
        if message.before is not None:
            records = [r for r in records if r.version < message.before]
        page = records[-message.limit :]
        shares = self._shares(manifest, [r.version for r in page], here)
        items = [
            HistoryItem(
                memory_version=r.version,
                time=r.time,
                tokens=r.tokens,
                text=r.text,
                idempotency_key=r.idempotency.key if r.idempotency else None,
                surviving_share=min(1.0, shares[r.version]),
            )
            for r in reversed(page)
        ]
        more = len(records) > len(page)
        return History(message.tenant, manifest.version, items, page[0].version if more else None)

    def _shares(self, manifest: Manifest, versions: list[int], here: Born | None) -> dict[int, float]:
        """What is left of each version's block. ``here`` is what is in the memory, if it is at hand and this one."""
        config = self.residency.backbone.config
        # the block that fills an empty memory is in it many times: one of them is followed
        filled = self.residency.backbone.weights.initialized or 1 not in versions
        if here is not None and here.content == content(manifest) and filled:
            # not a count of every number up to the newest: an imported memory may have any
            born, counts = np.unique(here.born.numpy(), return_counts=True)
            left: dict[int, int] = dict(zip(born.tolist(), counts.tolist(), strict=True))
            each = here.born.shape[0] * config.num_tokens
            return {version: left.get(version, 0) / each for version in versions}
        return surviving(
            manifest.seed,
            versions,
            manifest.version,
            pool_size=config.pool_size,
            num_tokens=config.num_tokens,
            num_layers=config.num_layers,
            per_layer=config.drop_memory_per_layer,
        )

    # ------------------------------------------------------------ erasing

    def erasing(self, message: EraseTenant, cancelled: int) -> None:
        self._erasures[message.tenant] = _Erasure(message, cancelled)

    def step(self) -> None:
        """Erases those tenants whose last work has ended."""
        for tenant, erasure in list(self._erasures.items()):
            if not erasure.begun and self.engine.quiet(tenant):
                erasure.begun = True
                self._erase(erasure, self.residency.erase(tenant))

    def _erase(self, erasure: _Erasure, here: Erasure) -> None:
        message = erasure.message

        taken: list[float] = []

        def work() -> Receipt | None:
            try:
                taken.extend(quotas.of_the_erased(self.store, message, time.time()))
                return self.store.erase(message.tenant)
            finally:
                here.wipe()

        def done(result: object, error: ServiceError | None) -> None:
            del self._erasures[message.tenant]
            here.give_back()
            self.engine.updates.taken.note(message.tenant, taken)
            if error is None and result is None:
                error = TenantNotFound("there is no such tenant")
            if error is not None:
                self.engine.fail(message.id, error)
                return
            assert isinstance(result, Receipt)
            told = Erased(
                result.tenant, result.version, result.blobs, result.bytes, erasure.cancelled, here.tiers
            )
            self.engine.emit(Reply(message.id, told))

        with logs.about(message.id):
            self.engine.background(message.tenant, work, done)
