"""What people do with a memory: sessions of updates and chats, tenants by a Zipf law, readers that hang up.

Needs nothing but the standard library, so that locust's users and the open-loop generator behave alike. Everything
is drawn from the generator that is passed in: the same seed gives the same people.
"""

from __future__ import annotations

import math
import random
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal

PEOPLE = ("Mira Tolvan", "Jona Brandt", "Ruth Kessler", "Tomas Weil", "Ines Moravek", "Karl Osten")
PLACES = ("Tarnovik", "Lisbon", "Aldersund", "Brenmoor", "Vesk", "Port Halden")
WORK = (
    "at the old harbour",
    "in a bakery",
    "for the railway",
    "as a teacher",
    "at the mill",
    "in the library",
)


USUAL_WAIT, LONGEST_WAIT = 1.0, 30.0


def away(retry_after: str) -> float:
    """Seconds for which one who was refused stays away; a Retry-After that is a date, or nothing, is a usual one."""
    try:
        seconds = float(retry_after)
    except ValueError:
        return USUAL_WAIT
    return min(max(seconds, 0.0), LONGEST_WAIT) if math.isfinite(seconds) else USUAL_WAIT


@dataclass(frozen=True)
class Act:
    """One request of a session, sent ``think`` seconds after the answer to the one before.

    A reader with ``hang_up`` closes the connection after that many pieces of the answer.
    """

    kind: Literal["generate", "update"]
    think: float
    body: dict[str, Any]
    hang_up: int = 0


@dataclass(frozen=True)
class Session:
    """What one person does in a row. ``group`` is what the answers are told apart by in the report."""

    tenant: str
    acts: Sequence[Act]
    group: str = ""


@dataclass(frozen=True)
class Habits:
    """Shares are of sessions or of generations; ``think`` is a mean in seconds, ``tokens`` a range of lengths."""

    turns: float = 2.5
    think: float = 1.0
    tokens: tuple[int, int] = (16, 64)
    updating: float = 0.3
    most_updates: int = 3
    streaming: float = 0.9
    hanging_up: float = 0.05
    fixed_length: bool = True
    temperature: float | None = None


@dataclass
class Crowd:
    """Draws tenants by a Zipf law with ``exponent`` and their sessions by ``habits``."""

    names: Sequence[str]
    rng: random.Random
    habits: Habits = Habits()
    exponent: float = 0.8
    group: str = ""
    _sums: list[float] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._sums = list(accumulate(1 / (rank + 1) ** self.exponent for rank in range(len(self.names))))

    def tenant(self) -> str:
        return self.names[min(bisect(self._sums, self.rng.random() * self._sums[-1]), len(self.names) - 1)]

    def session(self) -> Session:
        """Perhaps a burst of updates, then a chat of one turn or several."""
        rng, habits = self.rng, self.habits
        acts: list[Act] = []
        if rng.random() < habits.updating:
            # a burst: what somebody pastes in comes without thinking time in between
            burst = range(rng.randint(1, habits.most_updates))
            acts += [Act("update", 0.0, {"text": fact(rng)}) for _ in burst]
        turns = 1 if habits.turns <= 1 else 1 + geometric(rng, habits.turns - 1)
        acts += chat(rng, habits, turns, thinking_first=bool(acts))
        return Session(self.tenant(), acts, self.group)


def geometric(rng: random.Random, mean: float) -> int:
    """How often something is done that is done again with the same chance each time: 0, 1, …"""
    count, again = 0, mean / (1 + mean)
    while count < 12 and rng.random() < again:
        count += 1
    return count


def fact(rng: random.Random, sentences: int = 3) -> str:
    """A few sentences for a memory to take in, one context long."""
    person, place = rng.choice(PEOPLE), rng.choice(PLACES)
    told = [
        f"{person} lives in {place}.",
        f"In spring {person} came there by train and works {rng.choice(WORK)}.",
        f"A sister of {person} stayed in {rng.choice(PLACES)} with a dog called Brusso.",
        f"Every winter they meet in {rng.choice(PLACES)} and walk along the river for a week.",
    ]
    return " ".join(told[:sentences])


def chat(rng: random.Random, habits: Habits, turns: int, *, thinking_first: bool = False) -> list[Act]:
    """The turns of a chat, each with all that was said before. The answers in it are stand-ins of the usual length:
    to put the real ones in, the client would have to parse every event, and would be measured itself."""
    said: list[dict[str, str]] = []
    acts = []
    for turn in range(turns):
        person = rng.choice(PEOPLE)
        said = [*said, {"role": "user", "content": f"Where does {person} live?"}]
        think = rng.expovariate(1 / habits.think) if habits.think and (turn or thinking_first) else 0.0
        acts.append(question(rng, habits, said, think))
        said = [*said, {"role": "assistant", "content": f"{person} lives in {rng.choice(PLACES)}."}]
    return acts


def question(rng: random.Random, habits: Habits, messages: list[dict[str, str]], think: float) -> Act:
    """One generation; most are read as they come, and some of those readers leave before the end."""
    tokens = rng.randint(*habits.tokens)
    body: dict[str, Any] = {"messages": messages, "max_tokens": tokens}
    if habits.fixed_length:
        # a special token has no text, and only by its id an event of its own
        body |= {"ignore_eos": True, "return_token_ids": True}
    if habits.temperature is not None:
        body["temperature"] = habits.temperature
    hang_up = 0
    if rng.random() < habits.streaming:
        body["stream"] = True
        if rng.random() < habits.hanging_up:
            hang_up = rng.randint(1, max(1, tokens // 2))
    return Act("generate", think, body, hang_up)
