"""The search for the best load that a server sustains: a ladder of rates, and what is judged of the rungs. Pure.

What a server with bounded queues answers rises with what it is asked until it can do no more, and stays there. So the
highest goodput is found anywhere on that plateau, as noise will have it, and the load by it twice what can be served.
The load looked for is the lowest that brings as much as any does: where the plateau begins.

A rung is past that if less than ``SERVED`` of what it asked for came back. One rung says little, since a machine may
have had something else to do for a second: one that falls behind a lower one is played again, and the ladder ends
above ``PAST`` rungs in a row that are past. It goes down as well if it began too high. Half rungs around the best one
refine it. However it goes, no more than ``MOST`` are played.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

STEP, FIRST = 1.2, 0.7
"""How much a rung is above the one below it, and where the first one is, of what readers get who ask again at once."""
SERVED, PAST, MOST = 0.85, 2, 10
FALLEN, AS_GOOD = 0.9, 0.97
"""Of the highest goodput: what is less is a dip, and what is no less is as good."""
_HALF = STEP**0.5


@dataclass(frozen=True)
class Rung:
    """Requests a second, and the tokens a second that were asked for and that came back in time."""

    rate: float
    asked: float
    goodput: float

    @property
    def past(self) -> bool:
        return self.goodput < SERVED * self.asked


Play = Callable[[float], Awaitable[Rung]]


async def climb(play: Play, able: float) -> list[Rung]:
    """Plays rung by rung, up, down if need be, and around the best one; in order of rate. ``able`` is in requests a
    second."""
    # two are kept for the half rungs
    left = MOST - 2
    rungs: list[Rung] = []

    async def add(rate: float) -> None:
        nonlocal left
        left -= 1
        rung = await play(rate)
        highest = max((r.goodput for r in rungs if r.rate < rate), default=0.0)
        if left and rung.goodput < FALLEN * highest:
            left -= 1
            rung = max(rung, await play(rate), key=lambda r: r.goodput)
        rungs.append(rung)

    rate = FIRST * able
    while left and not (len(rungs) >= PAST and all(r.past for r in rungs[-PAST:])):
        await add(rate)
        rate *= STEP
    while left and min(rungs, key=lambda r: r.rate).past:
        await add(min(r.rate for r in rungs) / STEP)
    middle = best(rungs).rate
    rungs += [await play(middle / _HALF), await play(middle * _HALF)]
    return sorted(rungs, key=lambda r: r.rate)


def best(rungs: Sequence[Rung]) -> Rung:
    """The lowest rung that brings as much as any does."""
    enough = AS_GOOD * max(r.goodput for r in rungs)
    return min((r for r in rungs if r.goodput >= enough), key=lambda r: r.rate)
