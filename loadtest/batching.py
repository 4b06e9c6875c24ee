"""What batching across tenants gains: the same generations at once, and one after another, in turns.

    python -m loadtest.batching --url http://127.0.0.1:8000 --tenants 8
    python -m loadtest.batching --plans      # what the scheduler's part of each step costs; needs no server

Each tenant has a memory of its own with one update in it. Rounds alternate, so that a machine whose speed
drifts does not favour either side; the ratio is that of the rounds' medians.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import secrets
import statistics
import sys
import time
from datetime import date

from rich.console import Console
from rich.table import Table

from experiments.client import Client
from loadtest import plans

TEXT = "Mira Tolvan lives in Tarnovik. She works at the old harbour and has a dog called Brusso."


async def generate(client: Client, tenant: str, tokens: int) -> int:
    body = {
        "tenant": tenant,
        "prompt": "Mira Tolvan lives in",
        "max_tokens": tokens,
        "temperature": 0.0,
        "ignore_eos": True,
    }
    answer = await client.call("POST", "/generate", body)
    return int(answer["usage"]["completion_tokens"])


async def measure(url: str, tenants: int, tokens: int, rounds: int) -> dict[str, list[float]]:
    """Tokens per second of each round, by way of asking."""
    run = secrets.token_hex(4)
    names = [f"batching-{run}-{i}" for i in range(tenants)]
    speeds: dict[str, list[float]] = {"one after another": [], "at once": []}
    async with Client(url, tenants) as client:
        for name in names:
            await client.update(name, TEXT)
            await generate(client, name, 4)
        for _ in range(rounds):
            start = time.perf_counter()
            made = sum([await generate(client, name, tokens) for name in names])
            speeds["one after another"].append(made / (time.perf_counter() - start))
            start = time.perf_counter()
            made = sum(await asyncio.gather(*(generate(client, name, tokens) for name in names)))
            speeds["at once"].append(made / (time.perf_counter() - start))
        for name in names:
            await client.erase(name)
    return speeds


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plans", action="store_true", help="time the scheduler's plans alone")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--tenants", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.plans:
        plans.report()
        print(conditions())
        return 0
    speeds = asyncio.run(measure(arguments.url, arguments.tenants, arguments.tokens, arguments.rounds))
    table = Table(
        title=f"{arguments.tenants} tenants, {arguments.tokens} tokens each, {arguments.rounds} rounds"
    )
    for column in ("", "tokens/s, median", "min", "max"):
        table.add_column(column, justify="right" if column else "left")
    for way, values in speeds.items():
        table.add_row(way, *(f"{v:.0f}" for v in (statistics.median(values), min(values), max(values))))
    Console().print(table)
    alone, together = (statistics.median(v) for v in speeds.values())
    print(f"ratio of medians: {together / alone:.2f}")
    print(conditions())
    return 0


def conditions() -> str:
    return f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"


if __name__ == "__main__":
    sys.exit(main())
