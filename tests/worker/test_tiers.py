"""Many tenants, few slots: everybody is served, nobody thrashes, and each reads their own memory."""

from __future__ import annotations

import random
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs
from torch import Tensor

from app.errors import ServiceError
from app.memory.arena import Arena
from app.memory.lanes import HostLanes, Mark
from app.memory.warm import Buffers
from app.messages import EraseTenant, Failed, Finished, Updated
from app.model.backbone import Backbone
from app.store.base import Manifest
from app.store.disk import DiskStore
from app.worker.scheduler import Limits
from tests.harness import Harness, load_backbone

PROMPT = [5, 7, 11, 13]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone("two-adapters")[0]


def text(seed: int, length: int = 20) -> list[int]:
    return random.Random(seed).choices(range(3, 90), k=length)


class Slow(Harness):
    """Background work comes back piece by piece, in any order of pieces that were there at the same time."""

    rng: random.Random

    def step(self) -> bool:
        waiting = self.inline.waiting
        self.rng.shuffle(waiting)
        some = self.rng.randrange(len(waiting) + 1)
        self.inline.waiting, later = waiting[:some], waiting[some:]
        self.inline.drain()
        self.inline.waiting += later
        moved = self.engine.step()
        self._collect()
        return moved


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    slots=st.integers(1, 2),
    hot=st.integers(1, 3),
    tenants=st.integers(2, 5),
    warm=st.sampled_from([0, 1, 2, 100]),
    running=st.integers(1, 8),
)
def test_every_request_completes_and_every_load_serves_one(
    seed: int, slots: int, hot: int, tenants: int, warm: int, running: int
) -> None:
    backbone = load_backbone("plain")[0]
    rng = random.Random(seed)
    limits = Limits(cache_rows=256, max_running=running)
    harness = Slow(
        backbone, slots=slots, hot=hot, warm_bytes=warm * Arena.bytes_per_pool(backbone), limits=limits
    )
    residency = harness.engine.residency
    harness.rng = rng
    requests: dict[str, tuple[str, str]] = {}
    for index in range(24):
        tenant = f"t{rng.randrange(tenants)}"
        if rng.random() < 0.5:
            requests[harness.begin_update(tenant, text(index))] = tenant, "update"
        else:
            requests[harness.begin_generate(tenant, PROMPT, rng.randrange(1, 12))] = tenant, "generate"
        for _ in range(rng.randrange(6)):
            harness.step()
    harness.run(4000)
    versions: dict[str, int] = {}
    for request, (tenant, kind) in requests.items():
        answer = harness.final(request)
        if kind == "update":
            assert isinstance(answer, Updated)
            versions[tenant] = versions.get(tenant, 0) + 1
        else:
            assert isinstance(answer, Finished)
        # what arrived before is in the memory, what arrived later is not
        assert answer.memory_version == versions.get(tenant, 0)
    assert sum(residency.traffic.loads.values()) <= len(requests)
    assert residency.counts["resident"] <= slots


@pytest.mark.parametrize("slots", [1, 2])
def test_a_tenant_that_always_has_more_to_write_lets_others_in(backbone: Backbone, slots: int) -> None:
    harness = Harness(backbone, slots=slots)
    greedy = [f"greedy{i}" for i in range(slots)]
    for name in greedy:
        for index in range(60):
            harness.begin_update(name, text(index))
    for _ in range(10):
        harness.step()
    other = harness.begin_generate("other", PROMPT, 4)
    while not harness.of(other):
        harness.step()
        assert not harness.engine.idle
    versions = [harness.store.load(name).version for name in greedy]  # type: ignore[union-attr]
    assert min(versions) < 60, "the other has waited until the greedy had nothing left"
    harness.run()
    assert isinstance(harness.final(other), Finished)


def test_two_tenants_in_one_slot_take_turns_of_more_than_one_request(backbone: Backbone) -> None:
    harness = Harness(backbone, slots=1, warm_bytes=10**9)
    ids = [harness.begin_generate(f"t{i % 2}", PROMPT, 6) for i in range(40)]
    harness.run()
    assert all(isinstance(harness.final(i), Finished) for i in ids)
    assert sum(harness.engine.residency.traffic.loads.values()) <= 4


def test_a_request_brings_its_memory_before_the_next_step(backbone: Backbone) -> None:
    harness = Harness(backbone, slots=2)
    harness.begin_generate("ada", PROMPT)
    assert len(harness.inline.waiting) == 1, "the loading waits for a step"
    assert harness.engine.residency.moving("ada")


def test_others_go_on_while_a_memory_is_loaded(backbone: Backbone) -> None:
    harness = Harness(backbone, slots=2)
    ada = harness.begin_generate("ada", PROMPT, 20)
    while len(harness.tokens(ada)) < 3:
        harness.step()
    harness.begin_generate("bob", PROMPT, 4)
    (loading,) = harness.inline.waiting
    for _ in range(10):
        harness.engine.step()
    harness._collect()
    assert len(harness.tokens(ada)) >= 12, "the loading of another's memory holds up everybody"
    assert harness.inline.waiting == [loading]
    harness.run()
    assert len(harness.tokens(ada)) == 20


def test_hits_and_loads_are_counted_by_tier(backbone: Backbone) -> None:
    """As /metrics shows them: the share of ``resident`` and ``warm`` is the hit rate."""
    harness = Harness(backbone, slots=1, warm_bytes=10**9)

    def counted() -> dict[str, float]:
        return {
            name.removeprefix("memory_"): count
            for name, count in harness.engine.stats().counters.items()
            if name.startswith(("memory_hits", "memory_loads", "memory_evictions")) and count
        }

    assert counted() == {}
    harness.update("ada", text(1))
    assert counted() == {"hits_total:cold": 1, "loads_total:cold": 1}
    harness.update("ada", text(2))
    assert counted() == {"hits_total:cold": 1, "hits_total:resident": 1, "loads_total:cold": 1}
    harness.generate("bob", PROMPT)
    harness.generate("ada", PROMPT)
    assert counted() == {
        "hits_total:cold": 2,
        "hits_total:resident": 1,
        "hits_total:warm": 1,
        "loads_total:cold": 2,
        "loads_total:warm": 1,
        "evictions_total:resident": 2,
    }
    gauges = harness.engine.stats().gauges
    each = Arena.bytes_per_pool(backbone)
    assert (gauges["memories:resident"], gauges["memory_bytes:resident"]) == (1, each)
    assert gauges["memories:warm"] == 1
    assert gauges["memory_bytes:warm"] > 0


def test_loads_under_way_are_bounded(backbone: Backbone) -> None:
    harness = Harness(backbone, slots=16)
    ids = [harness.begin_generate(f"t{i}", PROMPT, 4) for i in range(16)]
    harness.engine.step()
    assert harness.engine.residency.counts["loading"] == len(harness.inline.waiting) == 3
    harness.run()
    assert all(isinstance(harness.final(i), Finished) for i in ids)


def test_a_memory_that_has_not_changed_leaves_without_a_copy(backbone: Backbone) -> None:
    harness = Harness(backbone, slots=1, warm_bytes=10**9)
    traffic = harness.engine.residency.traffic
    for name in ("ada", "bob"):
        harness.update(name, text(1))
    expected = [harness.generate(name, PROMPT) for name in ("ada", "bob")]
    moved = traffic.moved["out"]
    for _ in range(3):
        assert [harness.generate(name, PROMPT) for name in ("ada", "bob")] == expected
    assert traffic.moved["out"] == moved > 0
    assert traffic.loads["warm"] >= 6
    harness.update("ada", text(2))
    assert harness.generate("bob", PROMPT) == expected[1]
    assert traffic.moved["out"] > moved
    assert harness.generate("ada", PROMPT) != expected[0]


def test_a_copy_of_another_version_than_the_stores_is_not_used(backbone: Backbone) -> None:
    harness = Harness(backbone, slots=1, warm_bytes=10**9)
    harness.update("ada", text(1))
    harness.generate("bob", PROMPT)
    assert harness.engine.residency.tier("ada") == "warm"
    other = Harness(backbone, store=harness.store)
    other.update("ada", text(2))
    assert harness.generate("ada", PROMPT) == other.generate("ada", PROMPT)
    assert harness.engine.residency.traffic.loads["warm"] == 0


def test_bringing_ahead_drives_out_nobody_whose_request_waits(backbone: Backbone) -> None:
    harness = Harness(backbone, slots=1)
    harness.generate("ada", PROMPT)
    harness.begin_generate("ada", PROMPT)
    harness.begin_generate("bob", PROMPT)
    assert harness.engine.residency.tier("ada") == "resident"
    harness.run()
    assert harness.engine.residency.traffic.loads["cold"] == 2


def test_a_memory_that_was_renewed_on_its_way_out_leaves_no_copy(backbone: Backbone) -> None:
    harness = Harness(backbone, slots=1, warm_bytes=10**9)
    harness.update("ada", text(1))
    harness.begin_generate("bob", PROMPT, 4)
    harness.engine.residency.renew("ada")
    harness.run()
    assert harness.engine.residency.bytes["warm"] == 0


def test_what_every_memory_begins_with_is_not_copied_out(backbone: Backbone) -> None:
    harness = Harness(backbone, slots=1, warm_bytes=10**9)
    for name in ("ada", "bob", "ada"):
        harness.generate(name, PROMPT)
    assert harness.engine.residency.traffic.moved["out"] == 0


def test_an_erased_tenant_leaves_no_copy_on_its_way_out(backbone: Backbone) -> None:
    harness = Harness(backbone, slots=1, warm_bytes=10**9)
    harness.update("ada", text(1))
    bob = harness.begin_generate("bob", PROMPT, 4)
    assert harness.engine.residency.tier("ada") == "warm"
    assert "ada" not in harness.engine.residency.warm, "the copy is still to be made"
    harness.send(EraseTenant(harness.id(), "ada"))
    harness.engine.step()
    harness.run()
    assert isinstance(harness.final(bob), Finished)
    assert harness.engine.residency.tier("ada") == "cold"
    assert harness.engine.residency.bytes["warm"] == 0


def test_ten_thousand_tenants_on_disk_share_sixteen_slots(
    tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    # what reaches the disk, and how soon, is not what is tested here
    for sync in ("os.fsync", "os.fdatasync"):
        monkeypatch.setattr(sync, lambda _: None)
    store = DiskStore(tmp_path)
    for index in range(10_000):
        store.create(Manifest(tenant=f"t{index}", seed=index, fingerprint="test", created=0.0))
    harness = Harness(backbone, store=store, slots=16, warm_bytes=40 * 2**20)
    rng, ids = random.Random(3), []
    for turn in range(20):
        names = rng.sample(range(10_000), 16) + rng.choices(range(30), k=8)
        for index in names:
            if turn % 4 == 0:
                ids.append(harness.begin_update(f"t{index}", text(index)))
            else:
                ids.append(harness.begin_generate(f"t{index}", PROMPT, 3))
        harness.run()
    assert all(isinstance(harness.final(i), Finished | Updated) for i in ids)
    residency = harness.engine.residency
    assert residency.counts["resident"] <= 16
    assert residency.traffic.hits["resident"] + residency.traffic.hits["warm"] > 0
    store.close()


def test_a_memory_that_was_read_is_readable_again_once_its_update_is_told(backbone: Backbone) -> None:
    h = Harness(backbone, slots=2)
    built: list[int] = []
    build = h.engine.arena.build_hot

    def counted(slot: int, rank: Tensor, hot: int) -> None:
        built.append(hot)
        build(slot, rank, hot)

    h.engine.arena.build_hot = counted  # type: ignore[method-assign]
    h.update("ada", text(1))
    assert not built, "nobody has ever read it"
    h.generate("ada", PROMPT, 2)
    assert len(built) == 1
    h.update("ada", text(2), text(3))
    memory = h.engine.residency.get("ada")
    assert memory is not None
    assert h.engine.residency.readable("ada")
    assert not memory.owed, "no request waits for it"
    assert len(built) == 2, "of the blocks of one update only the last is read"
    h.update("ada", text(4))
    h.generate("ada", PROMPT, 2)
    assert len(built) == 3


def test_a_copy_that_failed_is_read_by_nobody(backbone: Backbone) -> None:
    h = Harness(backbone, slots=2)
    h.generate("ada", PROMPT, 2)
    build, arena = h.engine.arena.build_hot, h.engine.arena
    used = arena.hot_used

    def failing(slot: int, rank: Tensor, hot: int) -> None:
        raise ServiceError("no room on the device")

    arena.build_hot = failing  # type: ignore[method-assign]
    # begun ahead, for nobody: nobody is failed by it
    h.update("ada", text(1))
    assert not h.engine.residency.readable("ada")
    assert not h.engine.residency.failures
    assert arena.hot_used == used - 1
    asked = h.begin_generate("ada", PROMPT, 2)
    h.run()
    assert isinstance(h.final(asked), Failed)
    arena.build_hot = build  # type: ignore[method-assign]
    again = h.generate("ada", PROMPT, 2)
    other = Harness(backbone, slots=2)
    other.update("ada", text(1))
    assert again == other.generate("ada", PROMPT, 2)


def test_a_copy_ahead_takes_nobody_elses(backbone: Backbone) -> None:
    h = Harness(backbone, slots=2, hot=2)
    h.generate("bob", PROMPT, 2)
    reader = h.begin_generate("ada", PROMPT, 60)
    for _ in range(4):
        h.step()
    h.begin_update("ada", text(1))
    while h.engine.updates.commits == 0 or h.inline.waiting:
        h.step()
    h.step()
    memory = h.engine.residency.get("ada")
    assert memory is not None
    assert memory.older, "the version before is still being read"
    assert h.engine.residency.readable("bob")
    h.run()
    assert isinstance(h.final(reader), Finished)


def test_who_leaves_does_not_take_the_place_of_the_copy_that_is_brought(backbone: Backbone) -> None:
    """One slot, room for one copy, two tenants in turn: one of them is found warm each time."""
    harness = Harness(backbone, slots=1, warm_bytes=Arena.bytes_per_pool(backbone))
    for number, name in enumerate(("ada", "bob")):
        harness.update(name, text(number))
    traffic = harness.engine.residency.traffic
    before = traffic.loads["warm"]
    for _ in range(3):
        for name in ("ada", "bob"):
            harness.generate(name, PROMPT)
    assert traffic.loads["warm"] - before == 3


@pytest.mark.usefixtures("all_logs")
@pytest.mark.parametrize("had", [0, 2])
def test_without_host_memory_the_one_that_leaves_is_not_kept_and_the_other_comes(
    backbone: Backbone, had: int
) -> None:
    """Pinned memory is not to be had but for ``had`` copies, whatever the budget says."""
    harness = Harness(backbone, slots=1, warm_bytes=10**9)
    residency = harness.engine.residency
    make, asked = residency.warm._make, []

    def failing() -> Buffers:
        asked.append("a copy")
        if len(asked) > had:
            raise RuntimeError("CUDA error: out of memory")
        return make()

    residency.warm._make = failing
    names = ["ada", "bob", "eve"]
    with capture_logs() as logs:
        for number, name in enumerate(names):
            harness.update(name, text(number))
        first = [harness.generate(name, PROMPT) for name in names]
        assert [harness.generate(name, PROMPT) for name in names] == first
    assert len(asked) == had + 1, "the seat is handed out again and again"
    warned = [entry for entry in logs if entry["log_level"] == "warning"]
    assert [entry["error"] for entry in warned] == ["CUDA error: out of memory"]
    assert len(residency.warm) == had
    assert (residency.traffic.moved["out"] > 0) == bool(had)
    # what there is of it is used on
    for _ in range(2):
        assert [harness.generate(name, PROMPT) for name in names[1:]] == first[1:]
    assert (residency.traffic.loads["warm"] > 0) == bool(had)


def test_a_block_goes_to_the_host_beside_the_steps(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the steps' own stream the copy would hold up everybody who decodes."""

    class Noting(HostLanes):
        now: object = None
        marks = 0

        def mark(self) -> Mark:
            self.marks += 1
            return self.marks

        @contextmanager
        def apart(self, after: Mark) -> Generator[None]:
            self.now = after
            try:
                yield
            finally:
                self.now = None

    h = Harness(backbone, slots=1)
    h.update("ada", text(1))
    residency, lanes = h.engine.residency, Noting(backbone.dtype)
    monkeypatch.setattr(residency, "_lanes", lanes)
    copied: list[object] = []
    bring = Tensor.cpu

    def noted(tensor: Tensor) -> Tensor:
        copied.append(lanes.now)
        return bring(tensor)

    h.begin_update("ada", text(2))
    for _ in range(10):
        if not h.inline.waiting:
            h.engine.step()
    assert lanes.marks == 1, "taken where the steps are issued, when the block is whole"
    monkeypatch.setattr(Tensor, "cpu", noted)
    h.run()
    # what is encoded lies on the host by then
    assert copied[0] == 1
    assert h.update("ada", text(3)).memory_version == 3
