"""How much of a device's time updates take from generations that run. Pure: seconds are passed in.

An update's context read beside generations makes their next tokens late, and its publishing does. Updates have a
``share`` of the time in which generations run. What they took is owed to those who read, so many times as their share
is smaller, and paid by steps without them; until it is, no context is read. Where nobody reads nothing is owed.

What contexts took is what their step took longer than its rows of decode alone. How long that is, is told by steps
without contexts, of which there is one now and then whatever is owed: one who took it for too long would never notice.
"""

from __future__ import annotations

from dataclasses import dataclass

# the longest that generations run by themselves, whatever one step has cost
_MOST_OWED = 1.0
# contexts are not cut smaller than this: each piece has a price of its own
_LEAST = 64
# fewer rows together would cost more each
_FEWEST = 8
# of a new measurement against those before it; of one that knows better
_NEW, _BETTER = 0.1, 0.5
# steps with contexts, at most, between two without
_ANEW = 8


@dataclass(frozen=True)
class Spent:
    """Where a step's ``seconds`` went: ``rows`` of decode, tokens of ``prompts`` and of ``updates`` with their tails.

    ``beside`` are seconds that updates took outside of steps since the last one.
    """

    rows: int
    prompts: int
    updates: int
    seconds: float
    beside: float = 0.0


class Alone:
    """What a step of decode takes by itself, as measured: a fixed part, and one for each row."""

    def __init__(self) -> None:
        self._rows = self._seconds = 0.0
        self._each = 0.0

    def __bool__(self) -> bool:
        return self._seconds > 0

    def seconds(self, rows: int) -> float:
        """Of a step of so many rows; 0 while nothing is measured."""
        return self._seconds + (rows - self._rows) * self._each if rows else 0.0

    def rows(self, seconds: float) -> float:
        """How many take so long."""
        if not self._each:
            return float("inf") if seconds >= self._seconds else 0.0
        return self._rows + (seconds - self._seconds) / self._each

    def note(self, rows: int, seconds: float, new: float) -> None:
        """A step of ``rows`` took so long; ``new`` is its weight against those before."""
        if not self:
            # as if nothing were fixed, until steps of other numbers of rows have been seen
            self._rows, self._seconds, self._each = rows, seconds, seconds / rows
            return
        more, error = rows - self._rows, seconds - self.seconds(rows)
        # rows that are few more or less say little about what each takes
        near = 1 + self._rows / 4
        self._each += _BETTER * error * more / (more**2 + near**2)
        self._rows += new * more
        self._seconds += new * (seconds - self._seconds)
        self._each = min(max(0.0, self._each), self._seconds / self._rows)


class Pace:
    """``share`` is above 0; 1 bounds nothing."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._owed = 0.0
        # measured: seconds of steps without contexts, and of a token of an update's context
        self._alone, self._token = Alone(), 0.0
        # steps with contexts since the last one without, and whether one without has begun
        self._since, self._measuring = 0, False
        # what a step that has begun will have added to what is owed, as far as is known
        self._expected = 0.0

    def begun(self, rows: int, updates: int) -> None:
        """A step of ``rows`` and of ``updates`` tokens begins, and the next is planned before it is spent."""
        cost = updates * self._token if self._token or not updates else _MOST_OWED
        self._expected = cost * (1 / self._share - 1) - self._alone.seconds(rows)
        self._measuring = not updates

    def room(self, rows: int) -> int:
        """Tokens of contexts in a step of ``rows`` that decode: what makes it twice as long, or the least; or none."""
        if self._share >= 1:
            return 2**31
        if self._owed + self._expected > 0 or (self._since >= _ANEW and not self._measuring):
            return 0
        return max(_LEAST, int(self._alone.seconds(rows) / self._token)) if self._token else _LEAST

    def rows(self, seconds: float) -> int:
        """Rows of decode that take so long, and a few at least; any number while nothing is measured."""
        return int(max(_FEWEST, min(self._alone.rows(seconds), 2**31))) if self._alone else 2**31

    def spent(self, step: Spent, *, reading: bool) -> None:
        """``reading``: whether anybody waits for the next token of a generation or of a score."""
        own, self._expected, self._measuring = step.beside, 0.0, False
        if step.updates:
            # a prompt's token costs about as much as a context's
            share = step.updates / (step.updates + step.prompts)
            cost = max(0.0, step.seconds - self._alone.seconds(step.rows)) * share
            self._token = _blend(self._token, cost / step.updates)
            own += cost
        if step.rows and not step.prompts and not step.updates:
            # where they are rare each counts for more
            self._alone.note(step.rows, step.seconds, _BETTER if self._since >= _ANEW else _NEW)
        elif step.rows and self._alone.seconds(step.rows) > step.seconds:
            # it would have taken no longer without the rest
            self._alone.note(step.rows, step.seconds, _BETTER)
        self._since = self._since + 1 if step.updates and reading else 0
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
