"""When requests are due, whatever the server does: arrivals do not wait for answers.

A generator that waits for an answer before it sends the next request sends least when the server is slowest, and
measures the few that it sent. Here sessions begin by a Poisson process and latencies are counted from the time at
which a request was due. Within a session a person reads the answer first: the next turn is due a thinking time
after it. The client's own lateness is kept beside the answers.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from loadtest.client import Answer, Client
from loadtest.people import Session

LAG_SECONDS = 0.05


@dataclass
class Lag:
    """How late the client itself was, in seconds: requests behind their due time, and its loop behind a timer."""

    requests: list[float] = field(default_factory=list)
    loop: list[float] = field(default_factory=list)

    async def watch(self) -> None:
        """Measures the loop until it is cancelled."""
        while True:
            began = time.monotonic()
            await asyncio.sleep(LAG_SECONDS)
            self.loop.append(max(0.0, time.monotonic() - began - LAG_SECONDS))


def poisson(rng: random.Random, rate: float, seconds: float) -> Iterator[float]:
    """Times at which something begins, ``rate`` times a second on average, from 0 to ``seconds``."""
    at = rng.expovariate(rate) if rate > 0 else seconds
    while at < seconds:
        yield at
        at += rng.expovariate(rate)


async def play(client: Client, session: Session, due: float, lag: Lag, patience: float = 180.0) -> None:
    """One person's requests. Who is refused, or gets no answer, leaves."""
    for number, act in enumerate(session.acts):
        due += act.think
        if (wait := due - time.monotonic()) > 0:
            await asyncio.sleep(wait)
        # a later turn is late only by what the client adds to the thinking time
        lag.requests.append(max(0.0, time.monotonic() - due))
        answer = await client.ask(
            act.kind,
            session.tenant,
            act.body,
            due=due,
            group=session.group,
            hang_up=act.hang_up,
            patience=patience,
        )
        if not answer.good and number + 1 < len(session.acts):
            return
        due = answer.end


async def open_loop(
    client: Client,
    sessions: Iterator[tuple[float, Session]],
    lag: Lag,
    *,
    patience: float = 180.0,
) -> tuple[float, float]:
    """Plays sessions at their times (seconds from now, in order) and waits for all to end.

    Returns the monotonic time of 0 and that of the last arrival. Whoever is not answered ``patience`` seconds after
    being due is taken for given up.
    """
    began = time.monotonic() + 0.01
    people: set[asyncio.Task[None]] = set()
    for at, session in sessions:
        if (wait := began + at - time.monotonic()) > 0:
            await asyncio.sleep(wait)
        person = asyncio.create_task(play(client, session, began + at, lag, patience))
        people.add(person)
        person.add_done_callback(people.discard)
    ended = time.monotonic()
    if people:
        await asyncio.gather(*people)
    return began, ended


async def closed_loop(
    client: Client, streams: int, seconds: float, make: Callable[[int], Session], group: str
) -> list[Answer]:
    """``streams`` readers, each of which asks again at once: what the server can do, not what people see."""
    until = time.monotonic() + seconds
    before = len(client.answers)

    async def reader(number: int) -> None:
        while time.monotonic() < until:
            session = make(number)
            for act in session.acts:
                answer = await client.ask(act.kind, session.tenant, act.body, group=group)
                if not answer.good:
                    await asyncio.sleep(0.1)

    await asyncio.gather(*(reader(number) for number in range(streams)))
    return client.answers[before:]
