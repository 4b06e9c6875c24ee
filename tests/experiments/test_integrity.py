"""Which answers are integrity's first, last and young ones."""

from __future__ import annotations

import pytest

from experiments.integrity import summary, window


def test_the_ends_of_a_million_answers_are_ten_thousand() -> None:
    counts = (1_000_000, 100_000, 99_990, 60, 19, 9, 0)
    assert [window(count) for count in counts] == [10_000, 10_000, 9_999, 6, 1, 1, 1]


def test_first_last_and_young_answers() -> None:
    # two memories in turn: 5 of the first 25 are right, then all, of the last 25 all but 10
    answers = [number < 5 for number in range(25)] + [True] * 200 + [number >= 10 for number in range(25)]
    behind = [number // 2 + 1 for number in range(250)]
    told = summary(answers, behind)
    assert (told["answers"], told["right"]) == (250, 220)
    assert told["accuracy"] == pytest.approx(0.88)
    assert told["ends"] == 25
    assert told["first"] == pytest.approx(0.2)
    assert told["last"] == pytest.approx(0.6)
    # a memory's first 100 updates are the first 200 here
    assert told["young"] == {"turns": 100, "answers": 200, "right": 180}
    assert told["settled"] == {"answers": 50, "right": 40}
    assert told["window"] == 2
    assert len(told["windows"]) == 125
    assert told["windows"][:4] == [1, 1, 0.5, 0]


def test_young_is_a_memory_and_not_the_run() -> None:
    # one that joins late is young at the end
    told = summary([True, False, True, False], [100, 101, 500, 1])
    assert told["young"] == {"turns": 100, "answers": 2, "right": 1}
    assert told["settled"] == {"answers": 2, "right": 1}
