"""The long one: whether anything grows."""

from __future__ import annotations

from loadtest.figures import mean
from loadtest.measures import READING, names
from loadtest.people import Crowd, Habits, fact
from loadtest.run import Run


async def steady(run: Run) -> None:
    """People as they are: chats with thinking time, bursts of updates, readers that hang up."""
    crowd = Crowd(names("p", 64), run.rng, Habits(), group="people")
    # with every tenant known, what is kept for tenants no longer grows because new ones come
    for name in crowd.names:
        await run.client.ask("update", name, {"text": fact(run.rng)}, group="setup")
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
