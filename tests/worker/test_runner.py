"""The runner looks whose the memory is before each step: what was given away is not read or written on."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from app.memory.arena import Arena, Memory, Misplaced
from app.model.backbone import Backbone
from app.worker.scheduler import Limits
from tests.harness import Harness, load_backbone

PROMPT = [5, 6, 7, 8, 9]
TEXT = list(range(10, 50))


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone("two-adapters")[0]


def resident(h: Harness, tenant: str) -> Memory:
    memory = h.engine.residency.get(tenant)
    assert memory is not None
    return memory


def give_the_slot(arena: Arena, memory: Memory) -> None:
    arena.give_slot(memory.slot)


def give_the_copy(arena: Arena, memory: Memory) -> None:
    assert memory.view.hot is not None
    arena.give_hot(memory.view.hot)


def take_the_copy(arena: Arena, memory: Memory) -> None:
    """As another tenant's coming does if it takes the copy for one that nobody reads."""
    assert memory.view.hot is not None
    arena._idle[memory.view.hot] = memory, memory.view


@pytest.mark.parametrize("give_away", [give_the_slot, give_the_copy, take_the_copy])
def test_what_another_tenant_has_got_meanwhile_is_read_no_further(
    backbone: Backbone, give_away: Callable[[Arena, Memory], None]
) -> None:
    # the one slot (or copy) that is given away is the one that the other tenant gets
    h = Harness(backbone, slots=2 if give_away is not give_the_slot else 1, hot=1)
    h.update("ada", TEXT)
    h.update("bob", TEXT[::-1])
    asked = h.begin_generate("ada", PROMPT, 60)
    while len(h.tokens(asked)) < 3:
        h.step()
    told, reader = h.tokens(asked), resident(h, "ada")
    give_away(h.engine.arena, reader)
    h.begin_generate("bob", PROMPT, 60)
    with pytest.raises(Misplaced):
        h.run()
    assert h.tokens(asked) == told


def test_a_prompt_is_not_read_on_in_what_another_tenant_has(backbone: Backbone) -> None:
    h = Harness(backbone, limits=Limits(step_tokens=2, cache_rows=4096))
    h.update("ada", TEXT)
    asked = h.begin_generate("ada", PROMPT, 4)
    while not resident(h, "ada").view.readers:
        h.step()
    give_the_copy(h.engine.arena, resident(h, "ada"))
    with pytest.raises(Misplaced):
        h.run()
    assert not h.tokens(asked)


def test_an_update_goes_on_in_no_slot_but_its_own(backbone: Backbone) -> None:
    h = Harness(backbone, limits=Limits(step_tokens=16, cache_rows=4096))
    h.update("ada", TEXT)
    h.begin_update("ada", TEXT)
    run = h.engine.writes.run("r1")
    while run is None or run.current is None or not run.current.done:
        h.step()
        run = h.engine.writes.run("r1")
    assert not run.current.finished
    give_the_slot(h.engine.arena, resident(h, "ada"))
    with pytest.raises(Misplaced):
        h.run()
    assert h.engine.updates.commits == 1


def test_an_update_goes_on_from_no_version_but_the_newest(backbone: Backbone) -> None:
    h = Harness(backbone, limits=Limits(step_tokens=16, cache_rows=4096))
    h.update("ada", TEXT)
    h.begin_update("ada", TEXT)
    run = h.engine.writes.run("r1")
    while run is None or run.current is None:
        h.step()
        run = h.engine.writes.run("r1")
    resident(h, "ada").version += 1
    with pytest.raises(Misplaced):
        h.run()
    assert h.engine.updates.commits == 1


def test_a_durable_block_is_written_into_no_other_tenants_slot(backbone: Backbone) -> None:
    h = Harness(backbone)
    h.update("ada", TEXT)
    h.begin_update("ada", TEXT)
    while h.engine.updates.commits == 1:
        h.engine.step()
        h.inline.drain()
    memory = resident(h, "ada")
    assert memory.version == 1, "committed, and to be published at the next step"
    give_the_slot(h.engine.arena, memory)
    before = [part.clone() for part in h.engine.arena.pools.parts(memory.slot)]
    with pytest.raises(Misplaced):
        h.step()
    for part, old in zip(h.engine.arena.pools.parts(memory.slot), before, strict=True):
        assert part.equal(old)


def test_who_gives_back_has_it_no_longer(backbone: Backbone) -> None:
    """Whatever goes wrong elsewhere, what is free belongs to nobody."""
    h = Harness(backbone, slots=2)
    h.generate("ada", PROMPT, 2)
    memory, arena = resident(h, "ada"), h.engine.arena
    view = memory.view
    arena.check(memory, view)
    h.engine.residency.forget("ada")
    with pytest.raises(Misplaced):
        arena.check(memory)
    assert arena._slot_owners == [None] * 2
    assert arena._hot_owners == [None] * 4
