"""The closed form against the served draw itself."""

from __future__ import annotations

import statistics

import torch

from app.model.forgetting import draw, survivors
from experiments.closed_form import Survival, deviation, survival

K, BLOCKS = 4, 5
N = K * BLOCKS


def shares(seeds: int, ages: int) -> list[list[float]]:
    """By age: of each seed's first block, the share that is left."""
    found: list[list[float]] = [[] for _ in range(ages + 1)]
    for seed in range(seeds):
        born = torch.zeros(N, dtype=torch.long)
        for version in range(1, ages + 2):
            forgotten = draw(seed, version, pool_size=N, num_tokens=K, num_layers=1, per_layer=False)
            born = torch.cat([born[survivors(forgotten, N)[0]], torch.full((K,), version)])
            found[version - 1].append((born == 1).sum().item() / K)
    return found


def test_mean_and_deviation_are_those_of_the_draw() -> None:
    found = shares(800, 6)
    for age, values in enumerate(found):
        spread = deviation(K, N, age)
        assert abs(statistics.fmean(values) - survival(K, N, age)) <= 4 * spread / 800**0.5
        assert abs(statistics.pstdev(values) - spread) <= 0.08 * spread + 1e-9


def test_the_wrong_forgetting_is_noticed() -> None:
    right, wrong = Survival(), Survival()
    for value in shares(400, 3)[3]:
        right.add(value, K, N, 3)
        wrong.add(value, K, N, 4)
    assert abs(right.figures()["distance"] or 0) < 4
    assert abs(wrong.figures()["distance"] or 0) > 4


def test_nothing_is_lost_at_once() -> None:
    kept = Survival()
    kept.add(1.0, K, N, 0)
    assert kept.figures()["distance"] == 0.0
    kept.add(0.5, K, N, 0)
    assert kept.figures()["distance"] is None
