"""Bounds on what is under way: who is told to wait how long, on a clock of the test's own."""

from __future__ import annotations

import heapq
import math

import pytest

from app.api.bounds import LONGEST, SHORTEST, Bound


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def busy(clock: Clock, rate: float, most: int = 8, done: int = 20) -> Bound:
    """A full bound that has given back ``done`` at ``rate`` a second, each place taken again at once."""
    bound = Bound(most, clock)
    bound.take(most)
    for _ in range(done):
        clock.now += 1 / rate
        bound.give(1)
        bound.take(1)
    return bound


@pytest.mark.parametrize("rate", [0.2, 1.0, 5.0, 40.0])
def test_a_crowd_that_waits_as_told_gets_in(rate: float) -> None:
    """A hundred come at once and are refused; while the server goes on at its pace, each comes back when told."""
    clock = Clock()
    bound = busy(clock, rate)
    crowd = min(100, int(LONGEST * rate))
    # HTTP's seconds are whole ones
    told = [math.ceil(bound.wait()) for _ in range(crowd)]
    assert told == sorted(told)
    assert told[-1] == pytest.approx(crowd / rate, abs=1 + 0.1 * crowd / rate)
    events = [(clock.now + seconds, 1) for seconds in told]
    events += [(clock.now + number / rate, 0) for number in range(1, math.ceil(rate * told[-1]) + 1)]
    heapq.heapify(events)
    admitted = 0
    while events:
        clock.now, arrival = heapq.heappop(events)
        if not arrival:
            bound.give(1)
        elif bound.fits(1):
            bound.take(1)
            admitted += 1
    assert admitted >= 0.95 * crowd


def test_the_wait_follows_the_pace() -> None:
    clock = Clock()
    bound = busy(clock, 10.0)
    assert bound.wait(20) == pytest.approx(2.0, rel=0.1)
    assert busy(clock, 0.5).wait(4) == pytest.approx(8.0, rel=0.1)
    slow = busy(clock, 0.5)
    # it becomes faster
    for _ in range(65):
        clock.now += 0.05
        slow.give(1)
        slow.take(1)
    assert slow.wait(40) == pytest.approx(2.0, rel=0.1)


def test_a_pace_that_stops_is_noticed() -> None:
    clock = Clock()
    bound = busy(clock, 10.0)
    before = bound.wait(20)
    clock.now += 20.0
    assert bound.wait(20) > 4 * before


def test_idle_time_says_nothing_of_the_pace() -> None:
    clock = Clock()
    bound = busy(clock, 10.0)
    bound.give(8)
    clock.now += 1000.0
    bound.take(8)
    # 20 one by one and 8 at once in two seconds
    assert bound.wait(20) == pytest.approx(20 / 14, rel=0.1)


def test_waits_are_bounded() -> None:
    clock = Clock()
    bound = Bound(1, clock)
    bound.take(1)
    assert bound.wait() == SHORTEST
    clock.now += 20.0
    # nothing has ever come back: as long again as it has been
    assert bound.wait() == 20.0
    clock.now += 1000.0
    assert bound.wait() == LONGEST
    bound = busy(clock, 1000.0)
    assert bound.wait() == SHORTEST
    assert max(bound.wait(1000) for _ in range(1000)) == LONGEST
    # and what many were told does not reach further than that
    bound.give(8)
    clock.now += LONGEST
    bound.take(8)
    assert bound.wait() < 3.0


def test_what_fits() -> None:
    bound = Bound(3, Clock())
    assert bound.fits(3)
    assert not bound.fits(4)
    bound.take(2)
    assert bound.fits(1)
    assert not bound.fits(2)
