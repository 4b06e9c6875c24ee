"""Erasing leaves nothing of a memory in any tier, not even where nobody would look for it."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from app.messages import Erased, EraseTenant, Reply
from app.model.backbone import Backbone
from tests.harness import Harness, load_backbone
from tests.worker.test_memories import PROMPT, begin, pool, reply

rng = random.Random(5)


def text(length: int = 20) -> list[int]:
    return [rng.randrange(3, 320) for _ in range(length)]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone("two-adapters")[0]


def rooms(harness: Harness) -> Iterator[tuple[str, Tensor]]:
    """Everything pools are ever in: slots, rotated copies, host memory."""
    residency = harness.engine.residency
    pools = residency.arena.pools
    for slot in range(residency.arena.slots):
        yield f"slot {slot}", pools.value[:, slot]
    if pools.hot_value is not None:
        for hot in range(pools.hot_value.shape[1]):
            yield f"copy {hot}", pools.hot_value[:, hot]
    tier = residency.warm
    for seat in [*tier._free, *(copy.seat for copy in tier._copies.values())]:
        yield "host", seat.buffers.parts[1]


def holding(harness: Harness, vectors: Tensor) -> list[str]:
    """Rooms with any of ``vectors`` [H_kv, T, d_head], values of the first layer, which no position changes."""
    wanted = vectors[0]
    return [name for name, room in rooms(harness) if bool((room[0, 0][:, None] == wanted).all(-1).any())]


def tails_of(harness: Harness, tenant: str) -> list[Tensor]:
    """The blocks that updates of the tenant wrote."""
    manifest = harness.store.load(tenant)
    assert manifest is not None
    return [block.hidden for _, block in harness.engine.residency.blocks(manifest)]


def tails_left(harness: Harness, tails: list[Tensor]) -> list[int]:
    """Slots with any row of the ``tails``."""
    rows = torch.cat(tails, dim=1)[0]
    return [
        slot
        for slot, tail in enumerate(harness.engine.residency.arena.tails)
        if bool((tail[0][:, None] == rows).all(-1).any())
    ]


def own_vectors(harness: Harness, tenant: str) -> Tensor:
    """The values of the tokens that updates of the tenant wrote."""
    found = pool(harness, tenant)
    assert bool((found.born[0] > 0).any())
    _, value = harness.engine.backbone.project(found.hidden)
    return value[0][:, found.born[0] > 0]


@pytest.mark.parametrize("warm_bytes", [0, 10**9])
def test_nothing_is_left_of_an_erased_memory(backbone: Backbone, warm_bytes: int) -> None:
    """Moved through every slot and tier, then erased while others are served; the others keep theirs."""
    harness = Harness(backbone, slots=2, hot=3, warm_bytes=warm_bytes)
    for _ in range(3):
        for name in ("ada", "bob", "eve"):
            harness.update(name, text())
            harness.generate(name, PROMPT)
    expected = {name: harness.generate(name, PROMPT) for name in ("bob", "eve")}
    vectors = {name: own_vectors(harness, name) for name in ("ada", "bob", "eve")}
    harness.generate("ada", PROMPT)
    tails = {name: tails_of(harness, name) for name in ("ada", "bob", "eve")}
    assert holding(harness, vectors["ada"]), "this test looks in the wrong places"
    assert tails_left(harness, tails["ada"]), "this test looks in the wrong places"
    tiers = ["resident", "warm"] if warm_bytes else ["resident"]
    receipt = reply(harness, EraseTenant, "ada")
    assert isinstance(receipt, Erased)
    assert receipt.tiers in (tiers, ["resident"])
    assert holding(harness, vectors["ada"]) == []
    assert tails_left(harness, tails["ada"]) == []
    assert tails_left(harness, tails["bob"] + tails["eve"])
    assert holding(harness, vectors["bob"]) or holding(harness, vectors["eve"])
    assert {name: harness.generate(name, PROMPT) for name in ("bob", "eve")} == expected
    for name in ("new", "newer", "newest"):
        assert harness.update(name, text()).memory_version == 1


def test_a_memory_that_is_leaving_is_erased_as_well(backbone: Backbone) -> None:
    """Erased in the moment when another tenant's load copies it to the host."""
    harness = Harness(backbone, slots=1, warm_bytes=10**9)
    harness.update("ada", text())
    vectors = own_vectors(harness, "ada")
    harness.begin_generate("bob", PROMPT)
    harness.engine.step()
    assert harness.engine.residency.get("ada") is None
    erase = begin(harness, EraseTenant, "ada")
    # before the load's thread has come back
    harness.engine.step()
    harness.run()
    erased = harness.final(erase)
    assert isinstance(erased, Reply)
    assert isinstance(erased.body, Erased)
    assert holding(harness, vectors) == []
    assert harness.engine.residency.tier("ada") == "cold"
    assert harness.update("ada", text()).memory_version == 1


def test_rooms_are_not_lost_by_erasing(backbone: Backbone) -> None:
    harness = Harness(backbone, slots=2, hot=2, warm_bytes=10**9)
    for number in range(6):
        for name in ("ada", "bob", "eve"):
            harness.update(name, text())
            harness.generate(name, PROMPT)
        assert isinstance(reply(harness, EraseTenant, ("ada", "bob", "eve")[number % 3]), Erased)
    arena = harness.engine.residency.arena
    for name in list(harness.store.tenants()):
        reply(harness, EraseTenant, name)
    assert (arena._free_slots, arena._free_hot) == ([0, 1], [0, 1])
    assert torch.count_nonzero(arena.pools.value) == 0
    assert arena.pools.hot_key is not None
    assert torch.count_nonzero(arena.pools.hot_key) == 0
