"""Blocks that are published together, against each published by itself: the same bits everywhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from app.memory.arena import Arena, Memory, View
from app.model.backbone import Backbone
from app.model.forgetting import Change, change, draw
from tests.harness import load_backbone


@pytest.fixture(scope="module", params=["plain", "two-adapters"])
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return load_backbone(request.param)[0]


def memories(backbone: Backbone, arena: Arena, count: int) -> list[Memory]:
    """Tenants at version 0, with pools of their own."""
    config, made = backbone.config, []
    generator = torch.Generator().manual_seed(1)
    rows = config.num_layers if config.drop_memory_per_layer else 1
    for number in range(count):
        hidden = torch.randn(config.num_layers, config.pool_size, config.hidden_size, generator=generator)
        slot = arena.take_slot()
        assert slot is not None
        rank = arena.project(slot, hidden, lambda layer: layer)
        born = torch.zeros(rows, config.pool_size, dtype=torch.int32)
        tail = hidden[:, -config.num_tokens :]
        made.append(Memory(f"t{number}", 7 + number, slot, 0, tail, born, View(0, rank)))
    return made


def blocks(backbone: Backbone, of: list[Memory]) -> list[tuple[Memory, Tensor, Tensor]]:
    config = backbone.config
    found: list[tuple[Memory, Tensor, Tensor]] = []
    for memory in of:
        generator = torch.Generator().manual_seed(memory.seed + 100 * memory.version)
        shape = (config.num_layers, config.num_tokens, config.hidden_size)
        forgotten = draw(
            memory.seed,
            memory.version + 1,
            pool_size=config.pool_size,
            num_tokens=config.num_tokens,
            num_layers=config.num_layers,
            per_layer=config.drop_memory_per_layer,
        )
        found.append((memory, torch.randn(shape, generator=generator), forgotten))
    return found


def changed(blocks: list[tuple[Memory, Tensor, Tensor]]) -> list[tuple[Memory, Tensor, Change | None]]:
    """With what they make of the ranks worked out, as the thread that commits does."""
    return [(m, hidden, change(m.view.rank, m.born, drawn, m.version + 1)) for m, hidden, drawn in blocks]


def test_together_is_as_one_by_one(backbone: Backbone) -> None:
    arenas = Arena(backbone, 4, 4), Arena(backbone, 4, 4)
    together, alone = (memories(backbone, arena, 3) for arena in arenas)
    for _ in range(3):
        arenas[0].publish_all(changed(blocks(backbone, together)))
        for memory, hidden, forgotten in blocks(backbone, alone):
            arenas[1].publish(memory, hidden, forgotten)
    for one, other in zip(together, alone, strict=True):
        assert one.version == one.view.version == other.version == 3
        assert one.tail is not None
        assert other.tail is not None
        pairs = [(one.view.rank, other.view.rank), (one.born, other.born), (one.tail, other.tail)]
        pairs += zip(arenas[0].pools.parts(one.slot), arenas[1].pools.parts(other.slot), strict=True)
        for ours, theirs in pairs:
            assert torch.equal(ours, theirs)
        for own in (one.view.rank, one.born):
            assert own.untyped_storage().nbytes() == own.nbytes, "nobody else's stays in memory with it"


def test_what_is_published_is_what_a_pool_read_back_holds(backbone: Backbone) -> None:
    arena, config = Arena(backbone, 3, 3), backbone.config
    made = memories(backbone, arena, 2)
    given = blocks(backbone, made)
    arena.publish_all(changed(given))
    for memory, hidden, _ in given:
        key, value = backbone.project(hidden)
        for layer in range(config.num_layers):
            newest = memory.view.rank[layer] >= config.pool_size - config.num_tokens
            slots = newest.nonzero()[:, 0][memory.view.rank[layer][newest].argsort()]
            assert torch.equal(arena.pools.key[layer, memory.slot][:, slots], key[layer])
            assert torch.equal(arena.pools.value[layer, memory.slot][:, slots], value[layer])
