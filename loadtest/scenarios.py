"""The scenarios whose arrivals do not wait for the server, and the rows of the table that each is there for."""

from __future__ import annotations

import asyncio
import math
import statistics
import time
from collections.abc import Sequence

from loadtest.arrivals import closed_loop
from loadtest.client import Answer
from loadtest.drain import drain
from loadtest.figures import mean, quantile, ratio
from loadtest.people import Act, Crowd, Habits, Session, fact
from loadtest.run import Phase, Run, Scenario
from loadtest.scrape import mean_of, since, total

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


# ------------------------------------------------------------ tokens a second


async def streams(run: Run) -> None:
    """32 tenants stream at once, against the worker's own loop and against one request at a time, in turns."""
    tenants, tokens = names("s", 32), max(16, round(128 * min(1.0, run.scale * 2)))
    body = {"prompt": PROMPT, "ignore_eos": True, "temperature": 0.0, "stream": True}

    async def over_http(at_once: Sequence[str], count: int) -> float:
        began = time.monotonic()
        answers = await asyncio.gather(
            *(
                run.client.ask("generate", t, body | {"max_tokens": count}, group=f"{len(at_once)} at once")
                for t in at_once
            )
        )
        return sum(a.tokens for a in answers if a.good) / (time.monotonic() - began)

    assert run.bare is not None
    await over_http(tenants, 8)
    await asyncio.to_thread(run.bare.generate, len(tenants), 8, PROMPT)
    speeds: dict[str, list[float]] = {"worker's loop": [], "over HTTP": [], "one at a time": []}
    rounds = max(2, run.rounds(8))
    for number in range(rounds):
        run.progress(f"round {number + 1} of {rounds}")
        own = await asyncio.to_thread(run.bare.generate, len(tenants), tokens, PROMPT)
        speeds["worker's loop"].append(own)
        speeds["over HTTP"].append(await over_http(tenants, tokens))
        speeds["one at a time"].append(
            statistics.mean([await over_http(tenants[i : i + 1], tokens // 2) for i in range(4)])
        )
    own, http, alone = (statistics.median(s) for s in speeds.values())
    share, gain = ratio(http, own), ratio(http, alone)
    run.row(
        "tokens/s over HTTP with 32 tenants streaming, of the worker's own loop",
        "50 %",
        "80 %",
        f"{100 * share:.0f} % ({http:.0f} of {own:.0f})",
        share >= 0.5,
        speeds=speeds,
    )
    run.row(
        "the same, against one request at a time",
        "≥ 4×",
        "8×",
        f"{gain:.1f}× ({http:.0f} against {alone:.0f})",
        gain >= 4,
    )


# ------------------------------------------------------------ overload


async def overload(run: Run) -> None:
    """Ten times the load that gives the best goodput, in turns with that load."""
    crowd = Crowd(names("o", 48), run.rng, READING, exponent=0.5, group="overload")
    each = READING.tokens[0]
    able = await run.capacity(crowd, 48, run.seconds(6, 2)) / each
    seconds = run.seconds(15, 3)
    settle = seconds / 5
    ladder: dict[float, float] = {}
    for share in (0.7, 0.85, 1.0, 1.15) if run.scale > 0.1 else (0.9,):
        phase = await run.open(f"{share:.0%} of capacity", seconds, (crowd, share * able))
        ladder[share * able] = goodput(run.client.answers, phase, settle)
    rate = max(ladder, key=lambda r: ladder[r])
    best, under, refusals = [], [], []
    for number in range(run.rounds(3)):
        calm = await run.open(f"best load, round {number + 1}", seconds, (crowd, rate))
        best.append(goodput(run.client.answers, calm, settle))
        storm = await run.open(f"ten times, round {number + 1}", seconds, (crowd, 10 * rate))
        under.append(goodput(run.client.answers, storm, settle))
        asked = within(run.client.answers, storm, "overload")
        refusals += [a.end - a.due for a in asked if a.status in (429, 503)]
    share = ratio(mean(under), mean(best))
    run.row(
        "`overload-10x`: goodput against the best sustainable load",
        "≥ 90 %",
        "97 %",
        f"{100 * share:.0f} % ({mean(under):.0f} of {mean(best):.0f} tokens/s)",
        share >= 0.9,
        ladder={f"{r:.1f}/s": g for r, g in ladder.items()},
        best=best,
        under=under,
        useful_seconds=USEFUL_SECONDS,
    )
    p99 = quantile(refusals, 0.99)
    run.row(
        "`overload-10x`: p99 of a refusal",
        "< 100 ms",
        "< 20 ms",
        f"{1e3 * p99:.0f} ms of {len(refusals):,}",
        p99 < 0.1,
        median=quantile(refusals, 0.5),
    )


# ------------------------------------------------------------ a hot tenant


async def hot_tenant(run: Run) -> None:
    """Two light tenants, alone and beside one that sends a hundred times its fair share, in turns."""
    light = Crowd(names("light", 2), run.rng, Habits(1, 0, (16, 32), 0, 1, 1, 0), exponent=0.0, group="light")
    greedy = Habits(turns=1, updating=0, hanging_up=0, streaming=1, tokens=(128, 128))
    hot = Crowd(["hot"], run.rng, greedy, group="hot")
    able = await run.capacity(hot, 32, run.seconds(6, 2))
    rate = 100 * able / 3 / 128
    seconds = run.seconds(25, 4)
    alone: list[Answer] = []
    beside: list[Answer] = []
    for number in range(run.rounds(3)):
        phase = await run.open(f"alone, round {number + 1}", seconds, (light, 4.0))
        alone += within(run.client.answers, phase, "light")
        phase = await run.open(f"beside, round {number + 1}", seconds, (light, 4.0), (hot, rate))
        beside += within(run.client.answers, phase, "light")
    before, after = (quantile(first_tokens(side), 0.99) for side in (alone, beside))
    refused = sum(not a.good for a in beside)
    times = ratio(after, before)
    run.row(
        "a light tenant's p99 time to first token beside a tenant sending 100 times its fair share, against alone",
        "≤ 3×",
        "1.5×",
        f"{times:.1f}× ({1e3 * after:.0f} against {1e3 * before:.0f} ms)"
        + (f", {refused} not answered" if refused else ""),
        times <= 3 and not refused,
        medians=[quantile(first_tokens(side), 0.5) for side in (alone, beside)],
        hot_requests_per_second=rate,
        samples=[len(alone), len(beside)],
    )


# ------------------------------------------------------------ many tenants, few resident


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
    phase = await run.open("many", run.seconds(90, 5), (crowd, 0.3 * able))
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


# ------------------------------------------------------------ updates of others


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
    run.row(
        "generations running during an update storm of other tenants: time per token against calm",
        "≤ 2×",
        "1.3×",
        f"{times:.2f}× ({1e3 * per_token[1]:.1f} against {1e3 * per_token[0]:.1f} ms)",
        times <= 2,
        updates_per_second_alone=rate,
        updates=len(updates),
        taken=sum(a.good for a in updates),
        longest_gaps=[max((a.longest_gap for a in side), default=0.0) for side in (calm, stormy)],
    )


# ------------------------------------------------------------ the long one


async def steady(run: Run) -> None:
    """People as they are: chats with thinking time, bursts of updates, readers that hang up."""
    crowd = Crowd(names("p", 64), run.rng, Habits(), group="people")
    able = await run.capacity(Crowd(crowd.names[:16], run.rng, READING), 32, run.seconds(6, 2))
    seconds = 60 * run.minutes
    first = len(run.result.samples)
    # a session is about a hundred and ten tokens, with its updates about twice the work
    await run.open("steady", seconds, (crowd, 0.3 * able / 220))
    samples = run.result.samples[first:]
    settled = samples[0].time + min(300.0, seconds / 6)
    after = [s for s in samples if s.time >= settled]
    tenth = max(1, len(after) // 10)
    resident = [sum(s.resident) / 1e6 for s in after]
    growth = mean(resident[-tenth:]) - mean(resident[:tenth])
    run.row(
        f"{run.minutes:g} minutes of `steady`: growth of the processes' memory after the first "
        f"{(settled - samples[0].time) / 60:.1g} minutes",
        "< 20 MB",
        "flat",
        f"{growth:+.1f} MB ({mean(resident[:tenth]):.0f} to {mean(resident[-tenth:]):.0f} MB)",
        growth < 20,
        api=[s.resident[0] for s in after[:: max(1, len(after) // 60)]],
        worker=[s.resident[1] for s in after[:: max(1, len(after) // 60)]],
    )


# what waits is served within the time in which it is useful: a longer queue only makes everybody late
_SHORT_QUEUE = {"max_running": 32, "queue_requests": 64, "queue_requests_tenant": 16}

SCENARIOS: dict[str, Scenario] = {
    "streams": Scenario(streams, slots=40, bare=True),
    "overload-10x": Scenario(
        overload,
        slots=56,
        options=_SHORT_QUEUE,
        planned=frozenset({"server_overloaded", "deadline_exceeded"}),
    ),
    "hot-tenant": Scenario(hot_tenant),
    "many-cold": Scenario(many_cold, options={"warm_bytes": 0}),
    "update-storm": Scenario(update_storm, slots=32),
    "drain": Scenario(drain, planned=frozenset({"worker_unavailable", "connection"}), compared=False),
    "steady": Scenario(steady),
}
