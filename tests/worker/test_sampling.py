"""How a request wants its tokens chosen is how the engine chooses them."""

from __future__ import annotations

from typing import Any

import pytest

from app.model.backbone import Backbone
from tests.harness import Harness, load_backbone

PROMPT = [5, 6, 7, 8, 9, 10, 11]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone("plain")[0]


@pytest.fixture(scope="module")
def greedy(backbone: Backbone) -> list[int]:
    return Harness(backbone).generate("ada", PROMPT, 16)


@pytest.mark.parametrize("only_the_best", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}], ids=str)
def test_what_leaves_the_likeliest_token_alone_is_greedy_however_hot(
    backbone: Backbone, greedy: list[int], only_the_best: dict[str, Any]
) -> None:
    hot = Harness(backbone).generate("ada", PROMPT, 16, temperature=5.0, seed=1)
    assert hot != greedy
    assert Harness(backbone).generate("ada", PROMPT, 16, temperature=5.0, seed=1, **only_the_best) == greedy


def test_a_seed_chooses_the_same_again_and_another_does_not(backbone: Backbone) -> None:
    first, again, other = (
        Harness(backbone).generate("ada", PROMPT, 16, temperature=5.0, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again != other


def test_with_a_boundless_penalty_no_token_comes_twice(backbone: Backbone) -> None:
    harness = Harness(backbone)
    # the prompt's own would be next
    prompt = [*PROMPT, *harness.generate("ada", PROMPT, 24)]
    free = harness.generate("ada", prompt, 24)
    assert set(free) & set(prompt) or len(set(free)) < 24
    tokens = harness.generate("ada", prompt, 24, repetition_penalty=1e6)
    assert len(set(tokens)) == 24
    assert not set(tokens) & set(prompt)
