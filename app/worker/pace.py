"""How much of a device's time updates take from generations that run. Pure: seconds are passed in.

An update's context read beside generations makes their next tokens late, and its publishing does. Updates have a
``share`` of the time in which generations run. What they took is owed to those who read, so many times as their share
is smaller, and paid by steps without them; until it is, no context is read. Where nobody reads nothing is owed.
"""

from __future__ import annotations

from dataclasses import dataclass

# the longest that generations run by themselves, whatever one step has cost
_MOST_OWED = 1.0
# contexts are not cut smaller than this: each piece has a price of its own
_LEAST = 64
# fewer rows together would cost more each
_FEWEST = 8
# of a new measurement against those before it
_NEW = 0.1


@dataclass(frozen=True)
class Spent:
    """Where a step's ``seconds`` went: ``rows`` of decode, tokens of ``prompts`` and of ``updates``.

    ``beside`` are seconds that updates took outside of steps since the last one.
    """

    rows: int
    prompts: int
    updates: int
    seconds: float
    beside: float = 0.0


class Pace:
    """``share`` is above 0; 1 bounds nothing."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._owed = 0.0
        # measured: seconds of a row of decode, and of a token of an update's context
        self._row = self._token = 0.0
        # what a step that has begun will have added to what is owed, as far as is known
        self._expected = 0.0

    def begun(self, rows: int, updates: int) -> None:
        """A step of ``rows`` and of ``updates`` tokens begins, and the next is planned before it is spent."""
        cost = updates * self._token if self._token or not updates else _MOST_OWED
        self._expected = cost * (1 / self._share - 1) - rows * self._row

    def room(self, rows: int) -> int:
        """Tokens of contexts in a step of ``rows`` that decode: what makes it twice as long, or the least; or none."""
        if self._share >= 1:
            return 2**31
        if self._owed + self._expected > 0:
            return 0
        return max(_LEAST, int(rows * self._row / self._token)) if self._token else _LEAST

    def rows(self, seconds: float) -> int:
        """Rows of decode that take so long, and a few at least; any number while nothing is measured."""
        return max(_FEWEST, int(seconds / self._row)) if self._row else 2**31

    def spent(self, step: Spent, *, reading: bool) -> None:
        """``reading``: whether anybody waits for the next token of a generation or of a score."""
        own, self._expected = step.beside, 0.0
        if step.updates:
            # a prompt's token costs about as much as a context's
            share = step.updates / (step.updates + step.prompts)
            cost = max(0.0, step.seconds - step.rows * self._row) * share
            self._token = _blend(self._token, cost / step.updates)
            own += cost
        elif step.rows and not step.prompts:
            self._row = _blend(self._row, step.seconds / step.rows)
        if not reading:
            self._owed = 0.0
            return
        others = step.seconds + step.beside - own
        before = self._owed
        # what the last step paid too much is kept for the next context; where nothing is owed nothing is saved up
        least = -_MOST_OWED if before > 0 else before
        self._owed = min(max(least, before + own * (1 / self._share - 1) - others), _MOST_OWED)


def _blend(old: float, new: float) -> float:
    return old + _NEW * (new - old) if old else new
