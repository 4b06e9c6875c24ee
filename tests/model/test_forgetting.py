"""The forgetting rule: on vectors and on ranks alike, reproducible, and as the paper's closed form says."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from app.model.forgetting import change, draw, forget, renumber, surviving, survivors

SHAPE = {"pool_size": 800, "num_tokens": 16, "num_layers": 3, "per_layer": True}


def test_the_draw_is_the_published_formula() -> None:
    generator = torch.Generator().manual_seed(7 * 1_000_003 + 5)
    expected = [torch.randperm(48, generator=generator) for _ in range(2)]
    drawn = draw(7, 5, pool_size=48, num_tokens=8, num_layers=2, per_layer=True)
    for row, permutation in zip(drawn, expected, strict=True):
        assert row.tolist() == sorted(permutation[40:].tolist())
    once = draw(7, 5, pool_size=48, num_tokens=8, num_layers=2, per_layer=False)
    assert once.tolist() == [drawn[0].tolist()]


def test_seeds_and_versions_draw_differently() -> None:
    rows = {tuple(draw(seed, version, **SHAPE)[0].tolist()) for seed in range(5) for version in range(1, 6)}
    assert len(rows) == 25
    draw(2**40 - 1, 10**6, **SHAPE)


@given(st.integers(0, 2**40 - 1), st.integers(1, 50), st.sampled_from([(12, 3, 1), (10, 1, 4), (9, 8, 2)]))
def test_moving_ranks_is_moving_vectors(seed: int, version: int, shape: tuple[int, int, int]) -> None:
    size, count, layers = shape
    pool = torch.arange(layers * size).view(layers, size, 1)
    slots = torch.full((layers, size + count, 1), -1)
    slots[:, :size] = pool
    rank = torch.full((layers, size + count), -1, dtype=torch.int32)
    rank[:, :size] = torch.arange(size, dtype=torch.int32)
    for step in range(3):
        drawn = draw(
            seed, version + step, pool_size=size, num_tokens=count, num_layers=layers, per_layer=layers > 1
        )
        block = torch.full((layers, count, 1), 1000 + step) + torch.arange(count)[None, :, None] * 10
        pool = forget(pool, drawn, block)
        rank, spare = renumber(rank, drawn)
        for layer in range(layers):
            slots[layer, spare[layer]] = block[layer]
            in_order = slots[layer, rank[layer].argsort()[count:]]
            assert in_order.tolist() == pool[layer].tolist()
            assert sorted(rank[layer].tolist()) == [-1] * count + list(range(size))


@pytest.mark.parametrize("per_layer", [False, True])
def test_a_change_is_what_becomes_of_the_ranks_and_of_who_wrote_them(per_layer: bool) -> None:
    layers, size, count = 3, 12, 3
    rank = torch.full((layers, size + count), -1, dtype=torch.int32)
    rank[:, :size] = torch.arange(size, dtype=torch.int32)
    born = torch.zeros(layers if per_layer else 1, size, dtype=torch.int32)
    for version in range(1, 9):
        drawn = draw(5, version, pool_size=size, num_tokens=count, num_layers=layers, per_layer=per_layer)
        given = rank.clone(), born.clone()
        made = change(rank, born, drawn, version)
        assert torch.equal(rank, given[0])
        assert torch.equal(born, given[1])
        ranks, slots = renumber(rank, drawn)
        assert made.version == version
        assert torch.equal(made.rank, ranks)
        assert torch.equal(made.slots, slots)
        block = torch.full((len(born), count, 1), version, dtype=torch.int32)
        assert torch.equal(made.born, forget(born[..., None], drawn, block)[..., 0])
        rank, born = made.rank, made.born


def test_survivors_keep_their_order_and_the_block_is_newest() -> None:
    drawn = torch.tensor([[1, 4]])
    assert survivors(drawn, 6).tolist() == [[0, 2, 3, 5]]
    pool = torch.arange(6).view(1, 6, 1)
    assert forget(pool, drawn, torch.tensor([[[7], [8]]])).flatten().tolist() == [0, 2, 3, 5, 7, 8]


@pytest.mark.parametrize("updates", [1, 10, 50, 120])
def test_survival_follows_the_closed_form(updates: int) -> None:
    """(1 - K/N)^t, within five standard errors of that many independent tokens."""
    expected = (1 - 16 / 800) ** updates
    shares = [surviving(seed, [1], 1 + updates, **SHAPE)[1] for seed in range(40)]
    tokens = 40 * 3 * 16
    error = (expected * (1 - expected) / tokens) ** 0.5
    assert abs(sum(shares) / len(shares) - expected) < 5 * error


def test_layers_forget_independently_only_if_they_are_to() -> None:
    together = draw(1, 1, pool_size=800, num_tokens=16, num_layers=3, per_layer=False)
    apart = draw(1, 1, **SHAPE)
    assert together.shape == (1, 16)
    assert len({tuple(row) for row in apart.tolist()}) == 3


@settings(deadline=None)
@given(
    st.integers(0, 2**20), st.integers(1, 3), st.integers(2, 6), st.integers(1, 5), st.integers(1, 60),
    st.lists(st.integers(1, 60), unique=True),
)  # fmt: skip
def test_surviving_share_counts_what_a_replay_counts(
    seed: int, layers: int, blocks: int, count: int, now: int, versions: list[int]
) -> None:
    shape: dict[str, Any] = {
        "pool_size": blocks * count, "num_tokens": count, "num_layers": layers, "per_layer": layers > 1
    }  # fmt: skip
    born = torch.zeros(layers, blocks * count, 1, dtype=torch.int64)
    for version in range(1, now + 1):
        born = forget(born, draw(seed, version, **shape), torch.full((layers, count, 1), version))
    shares = surviving(seed, versions, now, **shape)
    assert shares == {v: (born == v).sum().item() / (layers * count) for v in versions}
    assert shares.get(now, 1.0) == 1.0


def test_no_more_is_drawn_than_is_needed_to_find_all_of_a_pool() -> None:
    drawn: list[int] = []

    def counted(seed: int, version: int, **shape: Any) -> torch.Tensor:
        drawn.append(version)
        return draw(seed, version, **shape)

    with mock.patch("app.model.forgetting.draw", counted):
        shares = surviving(
            3, list(range(1, 5001)), 5000, pool_size=40, num_tokens=8, num_layers=2, per_layer=True
        )
    assert len(shares) == 5000
    assert sum(shares.values()) == 5.0
    assert len(drawn) < 60
