"""Sampling against what the parameters mean, row by row and whatever the neighbours."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from app.model import sampling
from app.model.sampling import Sampler, choose, filtered_distribution

LOGITS = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, -3.0]])


def support(**parameters: float) -> list[int]:
    sampler = Sampler(temperature=1.0, **parameters)  # type: ignore[arg-type]
    probabilities, ids = filtered_distribution(LOGITS, [sampler])
    return sorted(ids[probabilities > 0].tolist())


def test_greedy_takes_the_likeliest() -> None:
    assert choose(LOGITS.repeat(3, 1), [Sampler()] * 3).tokens == [0, 0, 0]


def test_filters_keep_what_they_should() -> None:
    probabilities = LOGITS.softmax(-1)[0].tolist()
    assert support() == [0, 1, 2, 3, 4, 5]
    assert support(top_k=2) == [0, 1]
    assert support(top_p=probabilities[0] - 0.01) == [0]
    assert support(top_p=probabilities[0] + 0.01) == [0, 1]
    assert support(min_p=probabilities[3] / probabilities[0] - 1e-4) == [0, 1, 2, 3]
    assert support(top_k=1, top_p=0.01, min_p=1.0) == [0]


def test_a_draw_follows_the_distribution() -> None:
    samplers = [Sampler(temperature=0.7, seed=seed) for seed in range(4000)]
    drawn = torch.tensor(choose(LOGITS.repeat(4000, 1), samplers).tokens)
    expected = (LOGITS / 0.7).softmax(-1)[0]
    for token in range(6):
        p = expected[token].item()
        assert abs((drawn == token).float().mean().item() - p) < 5 * math.sqrt(p * (1 - p) / 4000) + 1e-3


def test_a_seed_repeats_and_neighbours_do_not_matter() -> None:
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))

    def sampler(seed: int | None = 3) -> Sampler:
        return Sampler(temperature=1.3, top_p=0.9, seed=seed)

    alone = [choose(logits[2:3], [s]).tokens[0] for s in [sampler()] for _ in range(1)]
    neighbours = [sampler(8), Sampler(), sampler(), Sampler(repetition_penalty=1.2), sampler(None)]
    assert choose(logits, neighbours).tokens[2] == alone[0]
    one, two = sampler(), sampler()
    assert [choose(logits[2:3], [one]).tokens[0] for _ in range(20)] == [
        choose(logits[2:3], [two]).tokens[0] for _ in range(20)
    ]


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    logits = torch.tensor([[2.0, 1.9, -1.0, -1.1]])
    seen = torch.tensor([True, False, True, False])
    assert choose(logits, [Sampler(repetition_penalty=1.5, seen=seen.clone())]).tokens[0] == 1
    only = torch.tensor([[-1.0, -1.1]])
    assert choose(only, [Sampler(repetition_penalty=1.5, seen=torch.tensor([True, False]))]).tokens[0] == 1


def test_the_penalty_learns_of_the_tokens_it_chose() -> None:
    sampler = Sampler(repetition_penalty=5.0, seen=torch.zeros(3, dtype=torch.bool))
    logits = torch.tensor([[3.0, 2.0, 1.0]])
    assert [choose(logits, [sampler]).tokens[0] for _ in range(3)] == [0, 1, 2]


def test_logprobs_are_of_the_models_own_distribution() -> None:
    plain = LOGITS.log_softmax(-1)[0]
    chosen = choose(LOGITS.repeat(2, 1), [Sampler(), Sampler(temperature=5.0, top_k=1, logprobs=3)])
    assert chosen.tokens == [0, 0]
    assert set(chosen.likelihoods) == {1}, "only of those who asked"
    logprob, top = chosen.likelihoods[1]
    assert logprob == pytest.approx(plain[0].item(), abs=1e-6)
    assert [token for token, _ in top] == [0, 1, 2]
    assert [p for _, p in top] == pytest.approx(plain[:3].tolist(), abs=1e-6)
    assert choose(LOGITS, [Sampler(logprobs=0)]).likelihoods[0][1] == []


def test_only_allowed_tokens_are_ever_drawn() -> None:
    logits = torch.randn(1, 200, generator=torch.Generator().manual_seed(1))
    allowed = set(logits[0].topk(5).indices.tolist())
    samplers = [Sampler(temperature=3.0, top_k=5, seed=seed) for seed in range(500)]
    assert set(choose(logits.repeat(500, 1), samplers).tokens) == allowed


@pytest.mark.parametrize(
    "parameters",
    [
        {"temperature": 1e-300},
        {"temperature": 1e-40},
        {"temperature": 1e-7, "top_p": 1e-40, "min_p": 1.0},
        {"temperature": 1.0, "repetition_penalty": 1e-300},
        {"temperature": 1.0, "repetition_penalty": 1e-38},
        {"temperature": 1e-20, "repetition_penalty": 1e-20},
        {"temperature": 0.0, "repetition_penalty": 1e-300},
    ],
)
def test_no_parameter_takes_a_row_out_of_the_numbers(parameters: dict[str, float]) -> None:
    """A step that fails ends the worker, for all that run in it."""
    seen = torch.tensor([True, False, True, False, True, False])
    sampler = Sampler(**parameters, seen=seen.clone(), logprobs=2)  # type: ignore[arg-type]
    other = Sampler(temperature=1.0, seed=5)
    expected = choose(LOGITS, [Sampler(temperature=1.0, seed=5)]).tokens[0]
    chosen = choose(torch.cat([LOGITS, LOGITS]), [sampler, other])
    assert chosen.tokens[1] == expected
    # of what was seen the likeliest, where that is made likelier; else the likeliest of all
    assert chosen.tokens[0] in (0, 2)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_of_a_broken_pool_harms_no_other(broken: float, temperature: float) -> None:
    logits = torch.cat([torch.full_like(LOGITS, broken), LOGITS, LOGITS])
    logits[1, 3] = broken
    samplers = [Sampler(temperature=temperature, seed=seed) for seed in (1, 2, 5)]
    expected = choose(LOGITS, [Sampler(temperature=temperature, seed=5)]).tokens[0]
    chosen = choose(logits, samplers).tokens
    assert chosen[2] == expected
    assert all(0 <= token < LOGITS.shape[1] for token in chosen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_rows_are_worked_on_in_pieces_and_choose_the_same(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    vocab, count = 40, 23
    logits = (3 * torch.randn(count, vocab, generator=torch.Generator().manual_seed(4))).to(dtype)
    seen = torch.zeros(vocab, dtype=torch.bool)
    seen[::3] = True

    def samplers() -> list[Sampler]:
        kinds = [
            {"temperature": 1.0},
            {"temperature": 0.0},
            {"temperature": 0.8, "top_p": 0.9, "logprobs": 3},
            {"temperature": 1.2, "top_k": 5, "repetition_penalty": 1.3},
            {"temperature": 0.0, "repetition_penalty": 1.3, "logprobs": 1},
        ]
        made = []
        for index in range(count):
            parameters = kinds[index % len(kinds)]
            own = seen.clone() if "repetition_penalty" in parameters else None
            made.append(Sampler(**parameters, seed=index, seen=own))  # type: ignore[arg-type]
        return made

    whole, pieces = samplers(), samplers()
    expected = [choose(logits, whole) for _ in range(3)]
    sizes: list[int] = []
    choose_some = sampling._choose

    def noted(some: torch.Tensor, those: list[Sampler], *rest: Any, **how: Any) -> torch.Tensor:
        sizes.append(some.shape[0])
        return choose_some(some, those, *rest, **how)

    monkeypatch.setattr(sampling, "_choose", noted)
    monkeypatch.setattr(sampling, "_PIECE", 4 * vocab + 1)
    found = [choose(logits, pieces) for _ in range(3)]
    assert sizes == 3 * [4, 4, 4, 4, 4, 3]
    assert [chosen.tokens for chosen in found] == [chosen.tokens for chosen in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.likelihoods.keys() == other.likelihoods.keys()
        for row, (logprob, top) in one.likelihoods.items():
            assert logprob == pytest.approx(other.likelihoods[row][0], abs=1e-6)
            assert [token for token, _ in top] == [token for token, _ in other.likelihoods[row][1]]
    for one, other in zip(pieces, whole, strict=True):
        assert one.uniform() == other.uniform(), "each row draws once a choice"
        assert (one.seen is None) == (other.seen is None)
        assert one.seen is None or torch.equal(one.seen, other.seen)  # type: ignore[arg-type]
