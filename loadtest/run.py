"""One scenario's run: its server, its client, what they said, and the rows of the table that come of it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import math
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from loadtest.arrivals import Lag, closed_loop, open_loop, poisson
from loadtest.bare import Bare
from loadtest.client import Answer, Client
from loadtest.people import Crowd, Session
from loadtest.rows import Row
from loadtest.scrape import Agreement, Metrics, Sample, Watch, agreement, since
from loadtest.server import Server, scratch

MODEL = "pocket"


@dataclass(frozen=True)
class Phase:
    """A stretch of a run, in monotonic seconds: when arrivals began and ended."""

    name: str
    began: float
    ended: float

    @property
    def seconds(self) -> float:
        return self.ended - self.began


@dataclass
class Result:
    """All that is known of a scenario's run. ``planned`` are the codes of the 5xx that it was meant to bring about;
    ``seconds`` it took, server's start and end included."""

    name: str
    rows: list[Row] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    phases: list[Phase] = field(default_factory=list)
    agreements: list[Agreement] = field(default_factory=list)
    planned: frozenset[str] = frozenset()
    lag: Lag = field(default_factory=Lag)
    seconds: float = 0.0

    @property
    def unplanned(self) -> list[Answer]:
        """5xx that nobody asked for, streams that ended in an error or not at all, and requests never answered."""
        failed = [
            a
            for a in self.answers
            if a.status >= 500 or a.status == 0 or a.cut or (a.status == 200 and a.code)
        ]
        return [a for a in failed if a.code not in self.planned and not a.hung_up]


@dataclass
class Run:
    """What a scenario works with. ``scale`` shortens it; ``minutes`` is how long steady goes on."""

    result: Result
    client: Client
    server: Server
    rng: random.Random
    scale: float
    minutes: float
    directory: Path
    progress: Callable[[str], None]
    bare: Bare | None = None

    def seconds(self, wanted: float, least: float = 1.0) -> float:
        return max(least, wanted * self.scale)

    def rounds(self, wanted: int) -> int:
        return max(1, round(wanted * min(1.0, self.scale * 2)))

    def row(self, what: str, at_least: str, aim: str, reached: str, good: bool, **details: Any) -> None:
        self.result.rows.append(Row(what, at_least, aim, reached, good, details))

    async def open(self, name: str, seconds: float, *streams: tuple[Crowd, float]) -> Phase:
        """Plays sessions of each crowd at its rate (sessions a second) and waits for all to end."""
        self.progress(name)

        def arrivals() -> Iterator[tuple[float, Session]]:
            times = [(at, crowd) for crowd, rate in streams for at in poisson(self.rng, rate, seconds)]
            for at, crowd in sorted(times, key=lambda pair: pair[0]):
                yield at, crowd.session()

        began, _ = await open_loop(self.client, arrivals(), self.result.lag)
        return self.phase(name, began, began + seconds)

    def phase(self, name: str, began: float, ended: float) -> Phase:
        phase = Phase(name, began, ended)
        self.result.phases.append(phase)
        return phase

    async def capacity(self, crowd: Crowd, streams: int, seconds: float) -> float:
        """Tokens a second that ``streams`` readers get who ask again at once, their memories being there."""
        self.progress("what the server can do")
        names = list(crowd.names)

        def make(number: int) -> Session:
            session = crowd.session()
            return Session(names[number % len(names)], session.acts, "capacity")

        await closed_loop(self.client, streams, 0.1, make, "capacity")
        answers = await closed_loop(self.client, streams, seconds, make, "capacity")
        good = [a for a in answers if a.good]
        if not good:
            raise RuntimeError(f"no request was answered: {[(a.status, a.code) for a in answers[:3]]}")
        return sum(a.tokens for a in good) / (max(a.end for a in good) - min(a.sent for a in good))


Scene = Callable[[Run], Awaitable[None]]


@dataclass(frozen=True)
class Scenario:
    """``play`` against a server with ``slots`` pools and ``options``. ``bare`` wants the engine without a server too.

    ``planned`` are the codes of errors that it means to provoke. Where ``compared`` is not set, the scenario ends its
    servers, and nobody is left to ask for numbers.
    """

    play: Scene
    slots: int = 16
    options: dict[str, Any] = field(default_factory=dict)
    planned: frozenset[str] = frozenset()
    bare: bool = False
    compared: bool = True


def resident_bytes(sizes: dict[str, Any], slots: int) -> int:
    """``--resident-bytes`` for exactly ``slots`` pools (at least 8) on a CPU: each with a copy, and eight more."""
    return int(slots * (sizes["pool"] + sizes["copy"]) + 8 * sizes["copy"])


@asynccontextmanager
async def watched(client: Client, server: Server, result: Result) -> AsyncIterator[Watch]:
    """Samples the server, and the client's own lateness, while inside."""
    watch = Watch(client, server, result.samples)
    tasks = [asyncio.create_task(watch.run()), asyncio.create_task(result.lag.watch())]
    try:
        yield watch
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def run(
    name: str,
    scenario: Scenario,
    sizes: dict[str, Any],
    *,
    scale: float,
    minutes: float,
    seed: int,
    log: Path,
    progress: Callable[[str], None],
) -> Result:
    """Starts the server, plays the scenario, takes the server down. Raises RuntimeError if it does not start."""
    began = time.monotonic()
    result = Result(name, planned=scenario.planned)
    settings = {"model": MODEL, "resident_bytes": resident_bytes(sizes, scenario.slots), **scenario.options}
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(scratch()))
        bare = stack.enter_context(Bare(**settings)) if scenario.bare else None
        server = stack.enter_context(Server(directory / "store", log, **settings))
        async with Client(server.url) as client:
            run = Run(
                result, client, server, random.Random(seed), scale, minutes, directory, progress, bare=bare
            )
            result.answers = client.answers
            gc.collect()
            gc.freeze()
            async with watched(client, server, result) as watch:
                await watch.take()
                played = await _played(scenario, run)
                await watch.last()
            if played and scenario.compared:
                counted: Metrics = since(result.samples[0].metrics, result.samples[-1].metrics)
                result.agreements = agreement(counted, result.answers)
    result.seconds = time.monotonic() - began
    return result


async def _played(scenario: Scenario, run: Run) -> bool:
    """Whether it came to its end. What it has measured until then is kept, and that it did not is a row that falls
    short: an hour's results are not lost for one fault."""
    try:
        await scenario.play(run)
    except Exception as error:
        logging.getLogger(__name__).exception("%s ended early", run.result.name)
        run.result.rows.append(ended_early(run.result.name, error))
        return False
    return True


def ended_early(name: str, error: Exception) -> Row:
    reached = f"{type(error).__name__}: {error}"
    return Row(
        f"`{name}` is played to its end", "yes", "", reached.replace("\n", " ").replace("|", "/"), False
    )


def closing_rows(results: list[Result]) -> list[Row]:
    """What holds over all scenarios: both sides count alike, and nothing failed that was not meant to."""
    rows = []
    agreements = [(r.name, a) for r in results for a in r.agreements]
    if agreements:
        bad = [(name, a) for name, a in agreements if not a.good]
        worst = max((abs(a.difference) for _, a in agreements), default=0.0)
        rows.append(
            Row(
                "client's and server's numbers agree",
                "counts 3 %, times 5 %",
                "",
                f"{len(agreements) - len(bad)} of {len(agreements)}, the worst off by {_percent(worst)}",
                not bad,
                {"bad": [(name, asdict(a)) for name, a in bad]},
            )
        )
    unplanned = [a for r in results for a in r.unplanned]
    rows.append(
        Row(
            "unplanned 5xx, cut streams and lost requests over all scenarios",
            "0",
            "",
            f"{len(unplanned)} of {sum(len(r.answers) for r in results):,}",
            not unplanned,
            {"first": [asdict(a) for a in unplanned[:20]]},
        )
    )
    return rows


def _percent(share: float) -> str:
    return "all of it" if math.isinf(share) else f"{100 * share:.1f} %"
