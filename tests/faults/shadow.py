"""The same updates computed a second time, without a server, and compared with the pool that a store holds."""

from __future__ import annotations

import msgspec
import torch

from app.memory.codec import Pool, encode_snapshot
from app.memory.source import Source, default_seed
from app.store.base import Manifest, Store
from tests.fakes import MemoryStore
from tests.faults.ledger import Ledger, Violation, contexts_of
from tests.harness import Harness, load_backbone

# batches of other shapes round differently
_CLOSE = 1e-3
_NEVER = 1 << 30


class Shadow:
    """Follows tenants from check to check: ``pools`` are as they were found last, by version."""

    def __init__(self, model: str) -> None:
        torch.set_num_threads(1)
        self._backbone, self.fingerprint = load_backbone(model)
        self.pools: dict[str, tuple[int, Pool]] = {}

    def check(self, store: Store, ledger: Ledger) -> None:
        """The stored pool against the one that ``ledger.parts`` make. Raises Violation."""
        tenant = ledger.tenant
        manifest = store.load(tenant)
        if manifest is None:
            if ledger.parts:
                raise Violation(f"{tenant} is gone")
            return
        manifest, found = Source(self._backbone, store, self.fingerprint).settled_pool(manifest)
        if manifest.version != len(ledger.parts):
            raise Violation(f"{tenant} is at {manifest.version} instead of {len(ledger.parts)}")
        expected, known, old = self._expected(ledger)
        if not torch.equal(found.born.expand_as(expected.born), expected.born.expand_as(found.born)):
            raise Violation(f"{tenant}: the pool holds other updates than were acknowledged")
        if not torch.allclose(found.hidden, expected.hidden, rtol=_CLOSE, atol=_CLOSE):
            raise Violation(f"{tenant}: the pool holds other numbers than its updates make")
        if old is not None:
            # what the last check saw and no update has pushed out since is there bit for bit
            kept = (found.born <= known).expand(found.hidden.shape[:2])
            if not torch.equal(found.hidden[kept], expected.hidden[kept]):
                raise Violation(f"{tenant}: old memory tokens have changed")
        self.pools[tenant] = (manifest.version, found)

    def _expected(self, ledger: Ledger) -> tuple[Pool, int, Pool | None]:
        tenant = ledger.tenant
        known, old = self.pools.get(tenant, (0, None))
        store = MemoryStore()
        harness = Harness(self._backbone, self.fingerprint, store=store, slots=1, compacted_after=_NEVER)
        beginning = Manifest(tenant, default_seed(tenant), self.fingerprint, 0.0)
        if old is None:
            store.create(beginning)
        else:
            store.create(msgspec.structs.replace(beginning, version=known), encode_snapshot(old))
        for number, index in ledger.parts[known:]:
            harness.update(tenant, contexts_of(tenant, number)[index])
        manifest = store.load(tenant)
        assert manifest is not None
        return Source(self._backbone, store, self.fingerprint).pool(manifest), known, old
