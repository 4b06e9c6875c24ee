"""What scenarios take from the answers, and the habits that they share."""

from __future__ import annotations

from collections.abc import Sequence

from loadtest.client import Answer
from loadtest.people import Habits
from loadtest.run import Phase

PROMPT = "Mira Tolvan lives in"
# a first token later than this is of no use to anybody
USEFUL_SECONDS = 5.0
READING = Habits(turns=1, updating=0, hanging_up=0, streaming=1, tokens=(32, 32))


def names(prefix: str, count: int) -> list[str]:
    return [f"{prefix}-{number}" for number in range(count)]


def within(answers: Sequence[Answer], phase: Phase, group: str) -> list[Answer]:
    """The generations of ``group`` that were due in the phase."""
    return [
        a
        for a in answers
        if a.group == group and a.kind == "generate" and phase.began <= a.due <= phase.ended
    ]


def first_tokens(answers: Sequence[Answer]) -> list[float]:
    """Seconds from the time a request was due to its first token."""
    return [a.first - a.due for a in answers if a.good]


def goodput(answers: Sequence[Answer], phase: Phase, settle: float) -> float:
    """Tokens a second of whole answers in time, ``settle`` seconds after the phase's beginning and on."""
    began = phase.began + settle
    useful = [
        a.tokens
        for a in answers
        if a.good and began <= a.end <= phase.ended and a.first - a.due <= USEFUL_SECONDS
    ]
    return sum(useful) / (phase.ended - began)
