"""What a worker has promised to its clients, and whether a disk holds it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from app.memory.codec import decode_block, decode_snapshot
from app.messages import Answer, Failed, Reply, Updated, UpdateProgress
from app.store.base import Store
from tests.faults.ledger import Violation
from tests.faults.oracle import Oracle, Told, same_block, same_pool

TENANTS = ("ada", "bob", "carol")
# a rollback that ends in these has changed nothing
_UNCHANGED = {"version_not_kept", "tenant_not_found", "store_full"}


@dataclass(eq=False)
class Order:
    """An update as its client knows it. ``version`` it was acknowledged with; ``open``: an answer is awaited."""

    tenant: str
    texts: Told
    key: str | None
    version: int | None = None
    open: bool = False


@dataclass
class Removal:
    """A rollback or an erasure that may or may not have happened: down to ``version``."""

    tenant: str
    version: int
    erases: bool = False


class Promises:
    """``must``: by tenant what was acknowledged, version to text; ``doubts`` what may have been cut off of it.

    ``pending`` gives a tenant's removals that are not answered yet. ``orders`` are all updates that were ever sent.
    """

    def __init__(self, oracle: Oracle, pending: Callable[[str], list[Removal]]) -> None:
        self.oracle, self.pending = oracle, pending
        self.orders: list[Order] = []
        self.must: dict[str, dict[int, str]] = {tenant: {} for tenant in TENANTS}
        self.doubts: dict[str, list[Removal]] = {tenant: [] for tenant in TENANTS}

    def version(self, tenant: str) -> int:
        """The newest that was told; 0 while nobody can be sure of it."""
        unsure = self.doubts[tenant] or self.pending(tenant)
        return 0 if unsure else max(self.must[tenant], default=0)

    # ------------------------------------------------------------ promising

    def updated(self, order: Order, answer: Updated) -> None:
        order.version = answer.memory_version
        self.must[order.tenant][answer.memory_version] = order.texts[-1]

    def progress(self, order: Order, answer: UpdateProgress) -> None:
        tenant, version = order.tenant, answer.memory_version
        if self.doubts[tenant]:
            # the version tells how it ended
            self.must[tenant] = cut(self.must[tenant], version - 1)
            self.doubts[tenant] = []
        if version <= max(self.must[tenant], default=0):
            raise Violation(f"{tenant} comes to version {version} again")
        self.must[tenant][version] = order.texts[answer.done - 1]

    def removed(self, removal: Removal, answer: Answer) -> None:
        tenant = removal.tenant
        if isinstance(answer, Reply):
            self.must[tenant] = cut(self.must[tenant], removal.version)
        elif isinstance(answer, Failed) and (
            # an erasure that found no room may be half done, and is to be asked for again
            answer.code not in _UNCHANGED or (answer.code == "store_full" and removal.erases)
        ):
            self.doubts[tenant].append(removal)

    # ------------------------------------------------------------ comparing

    def compare(self, tenant: str, told: Told) -> None:
        """What a start finds against what was promised."""
        where = f"{tenant} was told {told}"
        if len(set(told)) < len(told):
            raise Violation(f"{where}: doubled")
        orders = {text: (order, i) for order in self.orders for i, text in enumerate(order.texts)}
        for at, text in enumerate(told):
            if text not in orders or orders[text][0].tenant != tenant:
                raise Violation(f"{where}: {text!r} is not this tenant's")
            order, index = orders[text]
            if index and order.texts[index - 1] not in told[:at]:
                raise Violation(f"{where}: {text} came before the one it follows")
        if _holds(self.must[tenant], told):
            return
        for removal in self.doubts[tenant] + self.pending(tenant):
            less = cut(self.must[tenant], removal.version)
            if _holds(less, told):
                self.must[tenant] = less
                return
        raise Violation(f"{where}: {self.must[tenant]} was acknowledged")

    def compare_blobs(self, store: Store, tenant: str, told: Told) -> None:
        manifest = store.load(tenant)
        if manifest is None:
            return
        where = f"{tenant}, told {told}"
        for record in manifest.blocks:
            block = decode_block(store.read(tenant, record.blob))
            if not same_block(block, self.oracle.block(tenant, told[: record.version])):
                raise Violation(f"{where}: the block of version {record.version} is another")
        if manifest.snapshot is not None:
            pool = decode_snapshot(store.read(tenant, manifest.snapshot.blob))
            if not same_pool(pool, self.oracle.pool(tenant, told[: manifest.snapshot.version])):
                raise Violation(f"{where}: the snapshot of version {manifest.snapshot.version} is another")


def cut(must: dict[int, str], version: int) -> dict[int, str]:
    return {at: text for at, text in must.items() if at <= version}


def _holds(must: dict[int, str], told: Told) -> bool:
    return all(len(told) >= version and told[version - 1] == text for version, text in must.items())
