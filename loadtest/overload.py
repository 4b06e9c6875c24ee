"""More than the server can do: from everybody at once, and from one tenant beside light ones."""

from __future__ import annotations

from dataclasses import asdict, replace

from loadtest.client import Answer
from loadtest.figures import mean, quantile, ratio
from loadtest.ladder import Rung, best, climb
from loadtest.measures import READING, USEFUL_SECONDS, first_tokens, goodput, names, within
from loadtest.people import Crowd, Habits
from loadtest.run import Run


async def overload(run: Run) -> None:
    """Ten times the load that gives the best goodput, in turns with that load."""
    crowd = Crowd(names("o", 48), run.rng, READING, exponent=0.5, group="overload")
    each = READING.tokens[0]
    able = await run.capacity(crowd, 48, run.seconds(6, 2)) / each

    async def rung(rate: float) -> Rung:
        seconds = run.seconds(15, 6)
        settle = seconds / 4
        phase = await run.open(f"{rate:.1f} requests a second", seconds, (crowd, rate))
        # what came due while answers were counted
        due = within(run.client.answers, replace(phase, began=phase.began + settle), "overload")
        asked = sum(a.asked for a in due) / (seconds - settle)
        return Rung(rate, asked, goodput(run.client.answers, phase, settle))

    rungs = await climb(rung, able)
    rate = best(rungs).rate
    seconds = run.seconds(20, 8)
    settle = seconds / 4
    at_best, under, refusals = [], [], []
    for number in range(run.rounds(3)):
        calm = await run.open(f"best load, round {number + 1}", seconds, (crowd, rate))
        at_best.append(goodput(run.client.answers, calm, settle))
        storm = await run.open(f"ten times, round {number + 1}", seconds, (crowd, 10 * rate))
        under.append(goodput(run.client.answers, storm, settle))
        sent = within(run.client.answers, storm, "overload")
        refusals += [a.end - a.due for a in sent if a.status in (429, 503)]
    share = ratio(mean(under), mean(at_best))
    # a ladder that ended below what the server can do has not found its best
    found = any(r.past for r in rungs)
    run.row(
        "`overload-10x`: goodput against the best sustainable load",
        "≥ 90 %",
        "97 %",
        f"{100 * share:.0f} % ({mean(under):.0f} of {mean(at_best):.0f} tokens/s at {rate:.3g} requests a second)"
        + ("" if found else ", and more might have been served: the ladder is too short"),
        share >= 0.9 and found,
        ladder=[asdict(r) for r in rungs],
        best=at_best,
        under=under,
        useful_seconds=USEFUL_SECONDS,
    )
    p99 = quantile(refusals, 0.99)
    run.row(
        "`overload-10x`: p99 of a refusal",
        "< 100 ms",
        "< 20 ms",
        f"{1e3 * p99:.0f} ms of {len(refusals):,}" if refusals else "nobody was refused",
        p99 < 0.1,
        median=quantile(refusals, 0.5),
    )


async def hot_tenant(run: Run) -> None:
    """Two light tenants, alone and beside one that sends a hundred times its fair share, in turns."""
    light = Crowd(names("light", 2), run.rng, Habits(1, 0, (16, 32), 0, 1, 1, 0), exponent=0.0, group="light")
    greedy = Habits(turns=1, updating=0, hanging_up=0, streaming=1, tokens=(256, 256))
    hot = Crowd(["hot"], run.rng, greedy, group="hot")
    able = await run.capacity(hot, 32, run.seconds(6, 2))
    rate = 100 * able / 3 / greedy.tokens[0]
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
