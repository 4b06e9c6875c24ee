"""Memories that are not there, and memories that others write."""

from __future__ import annotations

import asyncio
import math
import time

from loadtest.arrivals import closed_loop
from loadtest.client import Answer
from loadtest.figures import mean, quantile, ratio
from loadtest.measures import READING, first_tokens, names, within
from loadtest.people import Act, Crowd, Habits, Session, fact
from loadtest.run import Run
from loadtest.scrape import mean_of, since, total


async def many_cold(run: Run) -> None:
    """1,000 tenants with an update each, 16 of them resident."""
    tenants = names("m", 1000 if run.scale >= 0.5 else max(48, round(1000 * run.scale)))
    run.progress(f"{len(tenants)} tenants take in an update")
    waiting = iter(tenants)

    async def teach() -> None:
        for tenant in waiting:
            await run.client.ask("update", tenant, {"text": fact(run.rng)}, group="setup")

    await asyncio.gather(*(teach() for _ in range(16)))
    habits = Habits(
        turns=1, updating=0.1, most_updates=1, think=0.2, tokens=(16, 32), streaming=1, hanging_up=0
    )
    few = Crowd(tenants[:8], run.rng, READING)
    able = await run.capacity(few, 16, run.seconds(6, 2)) / 24
    crowd = Crowd(tenants, run.rng, habits, exponent=1.0, group="many")
    before = run.result.samples[-1].metrics
    phase = await run.open("many", run.seconds(150, 5), (crowd, 0.3 * able))
    await asyncio.sleep(2.5)
    counted = since(before, run.result.samples[-1].metrics)
    answers = [a for a in within(run.client.answers, phase, "many") if a.good]
    cold = first_tokens([a for a in answers if a.load > 0])
    resident = first_tokens([a for a in answers if a.load == 0])
    load = mean_of(counted, "memory_load_seconds")
    times = ratio(quantile(cold, 0.99), quantile(resident, 0.99) + load)
    run.row(
        f"cold tenants' p99 time to first token under `many-cold` ({len(tenants):,} tenants, 16 resident), "
        "against resident ones + the load time itself",
        "≤ 2×",
        "1.2×",
        f"{times:.1f}× ({1e3 * quantile(cold, 0.99):.0f} against {1e3 * quantile(resident, 0.99):.0f} "
        f"+ {1e3 * load:.0f} ms)",
        times <= 2,
        samples=[len(cold), len(resident)],
        medians=[quantile(cold, 0.5), quantile(resident, 0.5)],
        loads=total(counted, "memory_loads_total"),
    )


async def update_storm(run: Run) -> None:
    """Eight tenants read without a pause, while sixteen others send bursts of updates or are quiet."""
    readers, writers = names("r", 8), names("w", 16)
    crowd = Crowd(readers, run.rng, Habits(1, 0, (96, 96), 0, 1, 1, 0))

    def reading(number: int) -> Session:
        return Session(readers[number], crowd.session().acts, "readers")

    def writing(number: int) -> Session:
        return Session(writers[number], [Act("update", 0, {"text": fact(run.rng)})], "setup")

    run.progress("updates alone")
    alone = await closed_loop(run.client, len(writers), run.seconds(5, 2), writing, "setup")
    rate = sum(a.good for a in alone) / (max(a.end for a in alone) - min(a.sent for a in alone))
    await closed_loop(run.client, len(readers), 1.0, reading, "setup")
    seconds = run.seconds(15, 3)

    async def burst() -> None:
        """Once a second as many updates as the server can take when it does nothing else."""
        sent: list[asyncio.Task[Answer]] = []
        for tick in range(math.floor(seconds)):
            due = began + tick
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            sent += [
                asyncio.create_task(
                    run.client.ask(
                        "update", writers[i % len(writers)], {"text": fact(run.rng)}, due=due, group="storm"
                    )
                )
                for i in range(round(rate))
            ]
        await asyncio.gather(*sent)

    calm: list[Answer] = []
    stormy: list[Answer] = []
    for number in range(run.rounds(3)):
        run.progress(f"calm, round {number + 1}")
        began = time.monotonic()
        calm += await closed_loop(run.client, len(readers), seconds, reading, "calm")
        run.phase("calm", began, time.monotonic())
        run.progress(f"storm, round {number + 1}")
        began = time.monotonic()
        storm = asyncio.create_task(burst())
        await closed_loop(run.client, len(readers), seconds, reading, "stormy")
        stormy += [a for a in run.client.answers if a.group == "stormy" and a.sent >= began]
        run.phase("storm", began, time.monotonic())
        await storm
    per_token = [mean([a.per_token for a in side if a.good]) for side in (calm, stormy)]
    times = ratio(per_token[1], per_token[0])
    updates = [a for a in run.client.answers if a.group == "storm"]
    taken = sum(a.good for a in updates)
    run.row(
        "generations running during an update storm of other tenants: time per token against calm",
        "≤ 2×",
        "1.3×",
        f"{times:.2f}× ({1e3 * per_token[1]:.1f} against {1e3 * per_token[0]:.1f} ms)",
        # a storm that was turned away slows nobody
        times <= 2 and taken >= 0.97 * len(updates) > 0,
        updates_per_second_alone=rate,
        updates=len(updates),
        taken=taken,
        longest_gaps=[max((a.longest_gap for a in side), default=0.0) for side in (calm, stormy)],
    )
