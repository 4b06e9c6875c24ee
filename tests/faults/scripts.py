"""Random scripts of store operations, drawn by a seed, that are valid one after another."""

from __future__ import annotations

import random

from app.errors import TenantExists, TenantNotFound, VersionConflict
from app.store.base import Store
from tests.faults.model import TENANTS, Memories, Step

MOST_VERSIONS = 6
_WEIGHTS = {
    "commit": 8,
    "compact": 5,
    "fork": 4,
    "rollback": 3,
    "replace": 1,
    "erase": 1,
    "stale commit": 1,
    "stale compact": 8,
    "create again": 1,
    "another's commit": 1,
    "another's compact": 1,
}


class Refused(Step):
    """An operation that comes too late: the store must refuse it, and nothing changes."""

    def __init__(self, does: str, tenant: str, version: int, life: int, lineage: int, contents: str) -> None:
        super().__init__(does, tenant, version, life)
        self.lineage, self.stale = lineage, contents
        # what a memory of this name that was erased since had under way
        self.of: dict[str, float] = {"created": -1.0} if does.startswith("another's") else {}

    def on_store(self, store: Store, memories: Memories) -> None:
        try:
            if self.does == "create again":
                store.create(self.manifest())
            elif self.does.endswith("commit"):
                data = self.content(self.version).encode()
                store.commit(
                    self.tenant, self.version - 1, data, time=0.0, tokens=16, lineage=self.lineage, **self.of
                )
            else:
                store.compact(self.tenant, self.version, self.stale.encode(), lineage=self.lineage, **self.of)
        except (VersionConflict, TenantExists, TenantNotFound):
            return
        raise AssertionError(f"{self!r} was not refused")

    def on_model(self, memories: Memories) -> Memories:
        return dict(memories)


def script(seed: int, steps: int) -> list[Step]:
    """``steps`` operations that a model accepts in this order; each has a content of its own."""
    draw = random.Random(seed)
    memories: Memories = {}
    # the oldest version each tenant can still give, and what a compaction under way would have been of
    oldest: dict[str, int] = {}
    begun: dict[str, tuple[int, int, str]] = {}
    made: list[Step] = []
    while len(made) < steps:
        life = len(made) + 1
        tenant = draw.choice(TENANTS)
        step: Step | None
        if tenant not in memories:
            begun.pop(tenant, None)
            version = draw.choice([0, 0, 0, 1, 3])
            if draw.randrange(8):
                step = Step("import" if version else "create", tenant, version, life)
                oldest[tenant] = version
            else:
                step = Refused("absent commit", tenant, 1, life, 0, "")
        else:
            step = _step(draw, tenant, life, memories, oldest, begun)
        if step is None:
            continue
        made.append(step)
        memories = step.on_model(memories)
        if tenant in memories and tenant not in begun and memories[tenant].contents:
            memory = memories[tenant]
            if len(memory.contents) > oldest[tenant]:
                begun[tenant] = len(memory.contents), memory.lineage, "|".join(memory.contents)
    return made


def _step(
    draw: random.Random,
    tenant: str,
    life: int,
    memories: Memories,
    oldest: dict[str, int],
    begun: dict[str, tuple[int, int, str]],
) -> Step | None:
    """One more operation on a tenant that exists; None if the kind drawn is not possible now."""
    memory = memories[tenant]
    version = len(memory.contents)
    does = draw.choices(list(_WEIGHTS), list(_WEIGHTS.values()))[0]
    kept = range(oldest[tenant], version + 1)
    if does == "commit" and version < MOST_VERSIONS:
        return Step("commit", tenant, version + 1, life)
    if does == "compact" and version > oldest[tenant]:
        oldest[tenant] = draw.choice(kept[1:])
        return Step("compact", tenant, oldest[tenant], life)
    if does == "fork":
        free = [name for name in TENANTS if name not in memories]
        if free:
            target = draw.choice(free)
            begun.pop(target, None)
            oldest[target] = oldest[tenant]
            return Step("fork", tenant, draw.choice(kept), life, target)
    if does == "rollback":
        return Step("rollback", tenant, draw.choice(kept), life)
    if does == "replace":
        oldest[tenant] = draw.choice([1, 2])
        return Step("replace", tenant, oldest[tenant], life)
    if does == "erase":
        begun.pop(tenant, None)
        return Step("erase", tenant, version, life)
    if does == "stale commit" and version:
        return Refused(does, tenant, draw.choice([version, version + 2]), life, memory.lineage, "")
    if does == "another's commit":
        return Refused(does, tenant, version + 1, life, memory.lineage, "")
    if does == "another's compact" and version > oldest[tenant]:
        return Refused(does, tenant, version, life, memory.lineage, "of another")
    if does == "create again":
        return Refused(does, tenant, 0, life, 0, "")
    if does == "stale compact" and tenant in begun and begun[tenant][1] != memory.lineage:
        at, lineage, contents = begun.pop(tenant)
        return Refused(does, tenant, at, life, lineage, contents)
    return None
