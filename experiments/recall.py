"""Does it remember? Facts it never saw, injected once over HTTP, asked for at once and after other updates.

    python -m experiments.recall --url http://127.0.0.1:8000

Every fact gets a tenant of its own. It is asked for with the memory still empty, after the one update that
tells it, and again after unrelated updates. Names and values are held out: the pocket model's training never
contained them. An answer counts if it equals the value exactly.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import secrets
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import httpx
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from experiments.client import Client
from experiments.data import generator
from experiments.session import flatten


@dataclass
class Tally:
    """Right and asked, by moment (``empty``, or how many unrelated updates ago)."""

    right: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    asked: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    misses: list[dict[str, str]] = field(default_factory=list)

    def add(self, moment: str, question: str, answer: str, given: str) -> None:
        self.asked[moment] += 1
        self.right[moment] += given == answer
        if given != answer and moment != "empty":
            self.misses.append({"moment": moment, "question": question, "answer": answer, "given": given})

    def share(self, moment: str) -> float:
        return self.right[moment] / max(1, self.asked[moment])


async def one_fact(client: Client, index: int, run: str, seed: int, later: list[int], tally: Tally) -> None:
    """Plays one fact through in a tenant of its own, which is erased at the end, whatever ends it."""
    stream = generator(seed, index)
    fact = stream.fact()
    tenant = f"recall-{run}-{index}"
    try:
        tally.add("empty", fact.question, fact.answer, await client.ask(tenant, fact.question))
        await client.update(tenant, fact.statement)
        passed = 0
        for moment in later:
            while passed < moment:
                await client.update(tenant, stream.unrelated(fact).statement)
                passed += 1
            tally.add(str(moment), fact.question, fact.answer, await client.ask(tenant, fact.question))
    finally:
        await client.erase(tenant)


async def measure(
    url: str, facts: int, later: list[int], seed: int, concurrency: int
) -> tuple[Tally, dict[str, object]]:
    """The tally of ``facts`` facts, and what the server says of itself."""
    tally, gate, run = Tally(), asyncio.Semaphore(concurrency), secrets.token_hex(4)
    async with Client(url, concurrency) as client:
        ready = await client.call("GET", "/ready")
        with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
            bar = progress.add_task("facts", total=facts)

            async def play(index: int) -> None:
                async with gate:
                    await one_fact(client, index, run, seed, later, tally)
                progress.advance(bar)

            # where one fails the others erase theirs before the client is closed
            async with asyncio.TaskGroup() as group:
                for index in range(facts):
                    group.create_task(play(index))
    return tally, ready


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--facts", type=int, default=500)
    parser.add_argument(
        "--later", type=int, nargs="*", default=[0, 1, 5, 10], help="unrelated updates between"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--json", type=Path, help="write figures and misses here")
    arguments = parser.parse_args()
    later = sorted(set(arguments.later))
    try:
        tally, ready = asyncio.run(
            measure(arguments.url, arguments.facts, later, arguments.seed, arguments.concurrency)
        )
    except (httpx.HTTPError, BaseExceptionGroup) as caught:
        error = flatten(caught)
        if not isinstance(error, httpx.HTTPError):
            raise
        raise SystemExit(f"the server at {arguments.url}: {error}") from None
    table = Table(title=f"{arguments.facts} unseen facts, one update each, exact match")
    for column in ("asked", "right", "of", "share"):
        table.add_column(column, justify="left" if column == "asked" else "right")
    for moment in ["empty", *map(str, later)]:
        name = {"empty": "with an empty memory", "0": "right after the update"}.get(
            moment, f"{moment} unrelated updates later"
        )
        table.add_row(name, str(tally.right[moment]), str(tally.asked[moment]), f"{tally.share(moment):.1%}")
    Console().print(table)
    print(f"{date.today()}, {platform.processor() or platform.machine()}, Python {platform.python_version()}")
    if arguments.json:
        figures = {m: tally.share(m) for m in ["empty", *map(str, later)]}
        arguments.json.write_text(
            json.dumps(
                {"server": ready, "facts": arguments.facts, "share": figures, "misses": tally.misses},
                indent=1,
            )
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
