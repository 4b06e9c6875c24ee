"""What another server has erased goes here too; whatever else is idle stays."""

from __future__ import annotations

import pytest

from app.errors import StoreFailed
from app.memory.arena import Memory
from app.model.backbone import Backbone
from app.store.base import ClaimMark
from app.worker import strays
from tests.fakes import MemoryStore
from tests.harness import Harness, load_backbone

PROMPT = [5, 7, 11, 13]
TEXT = list(range(3, 40))


class Shared(MemoryStore):
    """A store of several servers, on which this one has claimed ``mine``."""

    def __init__(self) -> None:
        super().__init__()
        self.mine: set[str] | None = None

    def claimed(self, tenant: str) -> ClaimMark | None:
        return super().claimed(tenant) if self.holds(tenant) else None

    def holds(self, tenant: str) -> bool:
        return self.mine is None or tenant in self.mine


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone("plain")[0]


@pytest.fixture
def harness(backbone: Backbone) -> Harness:
    h = Harness(backbone, store=Shared(), slots=3, warm_bytes=10**9)
    for tenant in ("ada", "bob", "cyd"):
        h.update(tenant, TEXT)
        h.generate(tenant, PROMPT, 2)
    return h


def memory_of(h: Harness, tenant: str) -> Memory:
    memory = h.engine.residency.get(tenant)
    assert memory is not None
    return memory


def look(h: Harness) -> None:
    """As if it were time."""
    h.engine.strays._next = 0.0
    for _ in range(4):
        h.step()


def left_of(h: Harness, slot: int) -> float:
    return max(float(part.abs().max()) for part in h.engine.arena.pools.parts(slot))


def test_a_tenant_that_is_erased_elsewhere_leaves_nothing_here(harness: Harness) -> None:
    store, residency = harness.store, harness.engine.residency
    assert isinstance(store, Shared)
    slots = {tenant: memory_of(harness, tenant).slot for tenant in ("ada", "bob", "cyd")}
    hot = memory_of(harness, "ada").view.hot
    assert hot is not None
    # one is erased, one is erased and made anew, both by another server
    store.mine = set()
    store.erase("ada")
    manifest = store.manifests["bob"]
    store.erase("bob")
    store.create(type(manifest)("bob", manifest.seed, manifest.fingerprint, manifest.created + 1))
    assert left_of(harness, slots["ada"]) > 0
    look(harness)
    assert residency.counts["resident"] == 1
    assert [residency.tier(tenant) for tenant in ("ada", "bob", "cyd")] == ["cold", "cold", "resident"]
    assert left_of(harness, slots["ada"]) == 0
    assert left_of(harness, slots["bob"]) == 0
    assert all(float(part.abs().max()) == 0 for part in harness.engine.arena.pools.copy_parts(hot))
    assert left_of(harness, slots["cyd"]) > 0
    # and what was wiped serves again
    store.mine = None
    harness.update("eve", TEXT)
    assert harness.generate("eve", PROMPT, 2) is not None


def test_who_is_at_work_is_left_alone(harness: Harness) -> None:
    store = harness.store
    assert isinstance(store, Shared)
    reading = harness.begin_generate("ada", PROMPT, 30)
    harness.step()
    harness.step()
    store.mine = set()
    store.erase("ada")
    look(harness)
    assert harness.engine.residency.tier("ada") == "resident"
    harness.run()
    assert len(harness.tokens(reading)) == 30


def test_nothing_is_asked_of_a_store_that_is_nobody_elses(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(harness.store, "load", lambda tenant: asked.append(tenant))
    look(harness)
    assert asked == []


def test_a_look_takes_no_tenant_into_use(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its claim would be kept for ever, and no other server be given it."""
    used: list[str] = []
    monkeypatch.setattr(harness.store, "claimed", lambda tenant: used.append(tenant))
    look(harness)
    assert used == []


def test_it_is_looked_once_a_minute(harness: Harness) -> None:
    store = harness.store
    assert isinstance(store, Shared)
    store.mine = set()
    each = harness.engine.strays
    each._next = 0.0
    each.step(1000.0)
    assert each._looking
    harness.inline.drain()
    assert not each._looking
    assert each._next > 0
    before = each._next
    each.step(before - 1)
    assert not each._looking
    each.step(before + strays.EVERY_SECONDS)
    assert each._looking


def test_a_store_that_does_not_answer_says_nothing_about_anybody(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = harness.store
    assert isinstance(store, Shared)
    store.mine = set()

    def failing(tenant: str) -> None:
        raise StoreFailed("no")

    monkeypatch.setattr(store, "load", failing)
    look(harness)
    assert harness.engine.residency.counts["resident"] == 3
