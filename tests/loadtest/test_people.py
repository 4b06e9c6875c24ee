"""The same seed gives the same people, and they keep to their habits."""

from __future__ import annotations

import itertools
import random
from collections import Counter

from loadtest.arrivals import poisson
from loadtest.people import LONGEST_WAIT, USUAL_WAIT, Crowd, Habits, away


def crowd(seed: int, **habits: object) -> Crowd:
    return Crowd([f"t{n}" for n in range(50)], random.Random(seed), Habits(**habits), exponent=1.0)  # type: ignore[arg-type]


def test_a_seed_decides_everything() -> None:
    mine, same, other = ([crowd(seed).session() for _ in range(1)] for seed in (1, 1, 2))
    first, again = crowd(3), crowd(3)
    assert [first.session() for _ in range(50)] == [again.session() for _ in range(50)]
    assert mine == same != other


def test_tenants_follow_zipf() -> None:
    drawn = crowd(0)
    counts = Counter(drawn.tenant() for _ in range(20_000))
    weights = [1 / (rank + 1) for rank in range(50)]
    for rank in (0, 1, 9, 49):
        expected = 20_000 * weights[rank] / sum(weights)
        assert abs(counts[f"t{rank}"] - expected) < 5 * expected**0.5


def test_habits() -> None:
    people = crowd(1, turns=3.0, updating=0.5, hanging_up=0.2, streaming=0.8, tokens=(4, 9), think=2.0)
    sessions = [people.session() for _ in range(3000)]
    reads = [act for s in sessions for act in s.acts if act.kind == "generate"]
    assert abs(len(reads) / len(sessions) - 3.0) < 0.2
    assert abs(sum(s.acts[0].kind == "update" for s in sessions) / len(sessions) - 0.5) < 0.05
    streamed = [act for act in reads if act.body.get("stream")]
    assert abs(len(streamed) / len(reads) - 0.8) < 0.03
    assert abs(sum(act.hang_up > 0 for act in streamed) / len(streamed) - 0.2) < 0.03
    assert not any(act.hang_up for act in reads if not act.body.get("stream"))
    assert all(4 <= act.body["max_tokens"] <= 9 for act in reads)
    thinking = [act.think for s in sessions for act in s.acts[1:] if act.kind == "generate"]
    assert abs(sum(thinking) / len(thinking) - 2.0) < 0.15
    assert not any(s.acts[0].think for s in sessions)


def test_a_chat_says_all_that_was_said() -> None:
    people = crowd(4, turns=4.0, updating=0.0)
    session = next(s for s in iter(people.session, None) if len(s.acts) > 2)
    said = [act.body["messages"] for act in session.acts]
    for before, after in itertools.pairwise(said):
        assert after[: len(before)] == before
        assert [m["role"] for m in after[len(before) :]] == ["assistant", "user"]


def test_arrivals_are_poisson() -> None:
    times = list(poisson(random.Random(1), 50.0, 200.0))
    assert times == sorted(times)
    assert all(0 < t < 200 for t in times)
    assert abs(len(times) - 10_000) < 500
    assert not list(poisson(random.Random(1), 0.0, 10.0))


def test_who_is_refused_stays_away_for_as_long_as_makes_sense() -> None:
    for told, seconds in {"3": 3.0, "0.5": 0.5, "86400": LONGEST_WAIT, "-1": 0.0}.items():
        assert away(told) == seconds
    for told in ("", "nan", "inf", "Wed, 21 Oct 2026 07:28:00 GMT"):
        assert away(told) == USUAL_WAIT
