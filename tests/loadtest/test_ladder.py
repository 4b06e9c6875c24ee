"""The search for the best load, on servers whose goodput is known: it is found whatever a machine does in between."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.ladder import MOST, STEP, Rung, best, climb

CAN = 30.0
EACH = 32


def search(able: float, served: Callable[[int, float], float]) -> tuple[list[Rung], list[float]]:
    """The rungs, and the rates in the order in which they were played. ``served`` says what of a rate is answered."""
    played: list[float] = []

    async def play(rate: float) -> Rung:
        played.append(rate)
        return Rung(rate, EACH * rate, EACH * served(len(played) - 1, rate))

    return asyncio.run(climb(play, able)), played


def plateau(number: int, rate: float) -> float:
    return min(rate, CAN)


def test_of_a_plateau_its_beginning_is_the_best_load() -> None:
    rungs, played = search(CAN, plateau)
    assert CAN <= best(rungs).rate < 1.1 * CAN
    # two rungs past what can be served are enough to know it
    assert max(played) < STEP**3 * CAN
    assert [r.rate for r in rungs] == sorted(played)


def test_where_more_load_does_harm_the_peak_is_the_best_load() -> None:
    """A server that answers less the more it is asked."""
    rungs, _ = search(CAN, lambda _, rate: rate if rate < CAN else CAN * (CAN / rate) ** 2)
    assert 0.85 * CAN < best(rungs).rate < 1.1 * CAN


@settings(max_examples=300, deadline=None)
@given(st.floats(0.7, 3.0), st.integers(0, MOST), st.floats(0.0, 0.9), st.integers(0, 10**6))
def test_one_dip_leads_nobody_astray(start: float, dip: int, left: float, seed: int) -> None:
    """Whatever the ladder's first guess, whichever rung is disturbed, and with noise on all of them."""
    rng = random.Random(seed)

    def served(number: int, rate: float) -> float:
        noise = 1 - rng.uniform(0, 0.02)
        return min(rate, CAN) * noise * (left if number == dip else 1.0)

    rungs, played = search(start * CAN, served)
    assert 0.9 * CAN <= best(rungs).rate <= 1.45 * CAN
    assert len(played) <= MOST
    assert any(r.past for r in rungs)


def test_two_searches_of_one_server_find_the_same_load_though_their_noise_differs() -> None:
    found = []
    for seed in range(50):
        rng = random.Random(seed)
        rungs, _ = search(CAN, lambda _, rate, rng=rng: min(rate, CAN) * (1 - rng.uniform(0, 0.025)))  # type: ignore[misc]
        found.append(best(rungs).rate)
    assert max(found) / min(found) < STEP


def test_with_chance_arrivals_as_well_hardly_any_search_is_far_off() -> None:
    """What is asked varies as Poisson's arrivals do, one rung is disturbed, the first guess is anything."""
    found = []
    for seed in range(600):
        rng = random.Random(seed)
        start, dip, played = rng.uniform(0.7, 1.8), rng.randrange(8), 0

        async def play(rate: float, rng: random.Random = rng, dip: int = dip) -> Rung:
            nonlocal played
            asked = rate * rng.gauss(1, 0.045)
            came = min(asked, CAN) * (1 - rng.uniform(0, 0.03)) * (0.6 if played == dip else 1)
            played += 1
            return Rung(rate, EACH * asked, EACH * came)

        found.append(best(asyncio.run(climb(play, start * CAN))).rate / CAN)
    found.sort()
    assert found[6] > 0.89
    assert found[-6] < 1.25


@pytest.mark.parametrize("start", [0.01, 0.2, 1.0, 5.0, 100.0])
def test_it_is_bounded_however_wrong_the_first_guess_was(start: float) -> None:
    rungs, played = search(start * CAN, plateau)
    assert len(played) <= MOST
    # and whoever was too low to see the end can tell
    assert any(r.past for r in rungs) == (start > 0.2)


def test_the_same_answers_make_the_same_ladder() -> None:
    assert search(CAN, plateau)[1] == search(CAN, plateau)[1]


def test_a_server_that_answers_nothing_ends_the_search() -> None:
    rungs, played = search(CAN, lambda *_: 0.0)
    assert len(played) <= MOST
    assert best(rungs).goodput == 0
