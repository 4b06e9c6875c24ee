"""Integrity (MemoryLLM): update on and on, and ask for the newest context each time.

    python -m experiments.integrity --updates 1000000 --tenants 80 --kill-at 5000

``--tenants`` memories take their updates in turn, all at once; how many each has taken is reported and compared with
the version that the server gives it. An update that a kill cut off is sent again with its idempotency key, so that none
is missing and none comes twice. ``--kill-at n`` shows it: the run kills itself (SIGKILL) behind n answers and goes on.
``--at-first m``: the others join when m of the memories have taken the first 10,000 (a tenth of a shorter run), so that
the first answers are of memories as full as the last ones' and not of many young ones.
``--also URL``, once or more, shares the memories out over other servers of the same model as well: a worker on a CPU
keeps one core busy. ``--ask-every m`` asks only after every m-th update. The memories stay, so that the same command
with more updates goes on from there; ``--erase`` ends that, and the command then only says so. ``--minutes`` stops the
run wherever it is by then. How to serve for it is in ``docs/performance.md``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
import time
from collections import Counter
from contextlib import AsyncExitStack
from typing import Any

from experiments import plot
from experiments.client import Client
from experiments.data import SEED_STRIDE, fair_fact, generator, item_of
from experiments.interrupted import ERASED, KILLED, forgotten, killed_and_resumed
from experiments.session import Session, asking, conduct, parser
from experiments.tables import percent, print_rows

WINDOWS = 100
MOST_WINDOW = 10_000
YOUNG = 100


class Integrity:
    """One run. A line of its log is "tenant turn right": the answer behind update number ``turn`` of a tenant; or that
    it was killed, or that its memories have been erased."""

    def __init__(self, session: Session) -> None:
        self.session, self.client, self.given = session, session.client, session.arguments
        self._clients = [session.client]
        self.answers: list[bool] = []
        self.behind: list[int] = []
        self.turns: Counter[int] = Counter()
        self.kills: list[int] = []
        self.erased = False
        self._joined = asyncio.Event()

    async def run(self) -> dict[str, Any]:
        async with AsyncExitStack() as others:
            for url in self.given.also:
                other = await others.enter_async_context(
                    Client(url, self.given.concurrency + 2, self.client.template)
                )
                await self._same_model(other, url)
                self._clients.append(other)
            return await self._run()

    async def _same_model(self, other: Client, url: str) -> None:
        """Raises SystemExit."""
        if (await other.call("GET", "/ready", once=True))["fingerprint"] != self.session.server[
            "fingerprint"
        ]:
            raise SystemExit(f"the server at {url} serves another model")

    def _client(self, tenant: int) -> Client:
        return self._clients[tenant % len(self._clients)]

    async def _run(self) -> dict[str, Any]:
        begin, tenants = time.monotonic(), self.given.tenants
        self._end = begin + 60 * self.given.minutes
        self._replay(self.session.log.lines)
        if self.erased:
            return await self._told_before()
        before = sum(self.turns.values())
        self._join()
        with self.session.progress() as progress:
            self._bar = progress.add_task("updates", total=self.given.updates, completed=before)
            self._progress = progress
            async with asyncio.TaskGroup() as group:
                for tenant in range(tenants):
                    group.create_task(self._one_after_another(tenant))
        seconds = time.monotonic() - begin
        figures = summary(self.answers, self.behind) | {
            "updates": sum(self.turns.values()),
            "kills_behind_answers": self.kills,
            "updates_a_second": (sum(self.turns.values()) - before) / seconds,
            "tenants": await self._versions(),
        }
        told = self.session.keep(figures, chart(figures, len(self.answers), self.given.ask_every))
        if self.given.erase:
            # first, so that an end between two of them leaves no run that goes on in half of its memories
            self.session.log.write(ERASED)
            await self._erase()
        return told

    async def _erase(self) -> None:
        for tenant in range(self.given.tenants):
            await self._client(tenant).erase(self.session.tenant(tenant))

    async def _told_before(self) -> dict[str, Any]:
        """The results of a run whose memories have been erased. Raises SystemExit if it should go on."""
        if self.given.erase:
            await self._erase()
        path = self.session.results
        done = all(self.turns[tenant] >= self._turns(tenant) for tenant in range(self.given.tenants))
        if not done or not path.exists():
            raise SystemExit("the memories of this run have been erased; --fresh begins anew")
        print(f"the memories of this run have been erased; {path} is what it measured", file=sys.stderr)
        told: dict[str, Any] = json.loads(path.read_text("utf-8"))
        return told

    def _replay(self, lines: list[bytes]) -> None:
        for line in lines:
            if line.startswith(KILLED):
                self.kills.append(len(self.answers))
                continue
            if line.startswith(ERASED):
                self.erased = True
                continue
            tenant, turn, right = map(int, line.split())
            # two runs that once wrote one log have told the same twice
            if turn > self.turns[tenant]:
                self.turns[tenant] = turn
                self._count(turn, bool(right))

    def _count(self, turn: int, right: bool) -> None:
        self.answers.append(right)
        self.behind.append(turn)

    def _turns(self, tenant: int) -> int:
        """How many updates this tenant takes in all."""
        updates, tenants = self.given.updates, self.given.tenants
        return int(updates // tenants + (tenant < updates % tenants))

    def _join(self) -> None:
        """Lets the others begin once those who do so at first have taken theirs."""
        if not self._joined.is_set() and sum(self.turns.values()) >= window(self.given.updates):
            self._joined.set()

    async def _one_after_another(self, tenant: int) -> None:
        name, every, client = self.session.tenant(tenant), self.given.ask_every, self._client(tenant)
        if tenant >= (self.given.at_first or self.given.tenants):
            await self._joined.wait()
        last = self._turns(tenant)
        for turn in range(self.turns[tenant] + 1, last + 1):
            if time.monotonic() > self._end:
                break
            if turn == 1:
                await client.ensure(name, self.given.seed * SEED_STRIDE + tenant)
            fact = fair_fact(generator(self.given.seed, tenant * 100_000_000 + turn))
            await client.update(name, fact.statement, short="fill", key=str(turn))
            if turn % every == 0 or turn == last:
                item = item_of(fact, self.session.exact)
                given = await client.ask(name, item.question, self.given.max_tokens)
                right = item.right(given, client.asked(item.question))
                self.session.log.write(f"{tenant} {turn} {int(right)}".encode())
                self._count(turn, right)
            self.turns[tenant] = turn
            self._join()
            self._progress.advance(self._bar)
        # whatever has come of it, nobody waits for this one any more
        self._joined.set()

    async def _versions(self) -> list[dict[str, int]]:
        """Of each tenant the updates it was sent and the version that the server says it has."""
        told = []
        for tenant in range(self.given.tenants):
            path = f"/tenants/{self.session.tenant(tenant)}"
            # one that was never sent any is not there
            view = (
                await self._client(tenant).call("GET", path) if self.turns[tenant] else {"memory_version": 0}
            )
            told.append({"updates": self.turns[tenant], "version": view["memory_version"]})
        return told


def window(count: int) -> int:
    """How many of so many updates or answers are the first ones, and the last ones."""
    return min(MOST_WINDOW, max(1, count // 10))


def summary(answers: list[bool], behind: list[int]) -> dict[str, Any]:
    """Accuracy by window, in order of the answers; of the first and of the last answers.

    ``behind`` is each answer's update, counted in its memory: a memory's first ones find it still mostly empty.
    """
    young = [right for right, turn in zip(answers, behind, strict=True) if turn <= YOUNG]
    size = max(1, len(answers) // WINDOWS)
    ends = window(len(answers))
    windows = [answers[i : i + size] for i in range(0, len(answers) - size + 1, size)]
    return {
        "answers": len(answers),
        "right": sum(answers),
        "accuracy": sum(answers) / max(1, len(answers)),
        "ends": ends,
        "first": sum(answers[:ends]) / ends,
        "last": sum(answers[-ends:]) / ends,
        "young": {"turns": YOUNG, "answers": len(young), "right": sum(young)},
        "settled": {"answers": len(answers) - len(young), "right": sum(answers) - sum(young)},
        "window": size,
        "windows": [sum(window) / size for window in windows],
    }


def chart(figures: dict[str, Any], answers: int, every: int) -> str | None:
    """Accuracy by window and running accuracy, over updates; None if there is no answer yet."""
    size, windows = figures["window"], figures["windows"]
    if not windows:
        return None
    points = [((number + 1) * size * every, value) for number, value in enumerate(windows)]
    running, total = [], 0.0
    for number, (at, value) in enumerate(points):
        total += value
        running.append((at, total / (number + 1)))
    lowest = min(windows)
    curves = [
        plot.Curve(f"each {size:,} answers", points),
        plot.Curve("running accuracy", running, dashed=True),
    ]
    title = f"Integrity: {answers:,} answers about the newest fact"
    low = 0.9 if lowest >= 0.9 else 0.0
    return plot.line_chart(title, "updates", "right", curves, y_range=(low, 1), y_percent=True)


def options() -> argparse.ArgumentParser:
    made = parser("integrity", __doc__)
    add = made.add_argument
    add("--updates", type=int, default=1_000_000, help="of all memories together")
    add("--minutes", type=float, default=math.inf, help="stop then, wherever it is")
    add("--tenants", type=int, default=16, help="memories, each updated one after another")
    add("--at-first", type=int, help="memories that take the first updates by themselves (default: all)")
    add(
        "--also",
        action="append",
        default=[],
        metavar="URL",
        help="another server of the same model, for some of the memories",
    )
    add("--ask-every", type=int, default=1, help="ask behind every so many updates of a memory")
    asking(made)
    add("--erase", action="store_true", help="erase the memories at the end")
    add("--kill-at", type=int, help="kill the run behind so many answers, and go on")
    add("--child", action="store_true", help=argparse.SUPPRESS)  # the run that --kill-at kills
    return made


def main() -> int:
    arguments = options().parse_args()
    path = arguments.results / "journal" / f"{arguments.name}.jsonl"
    if arguments.fresh and not arguments.child:
        asyncio.run(forgotten([arguments.url, *arguments.also], path))
    arguments.fresh = False
    if arguments.kill_at is not None and not arguments.child:
        return killed_and_resumed(path, sys.argv[1:], arguments.kill_at)
    arguments.concurrency = max(arguments.concurrency, arguments.tenants)
    # a run goes on with as many, or memories would be looked for where they are not
    arguments.servers = 1 + len(arguments.also)
    told = conduct(
        "integrity",
        arguments,
        lambda session: Integrity(session).run(),
        extendable={"updates", "minutes", "erase"},
    )
    same = all(one["updates"] == one["version"] for one in told["tenants"])
    print_rows(
        f"{told['updates']:,} updates of {len(told['tenants'])} memories, {told['updates_a_second']:.0f} a second",
        ["answers", "right"],
        [
            ["all", percent(told["accuracy"])],
            [f"first {told['ends']:,}", percent(told["first"])],
            [f"last {told['ends']:,}", percent(told["last"])],
        ],
    )
    print("the server's versions are " + ("as many as the updates" if same else "NOT as many as the updates"))
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
