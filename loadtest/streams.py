"""Tokens a second of many streams at once."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence

from loadtest.client import Answer
from loadtest.figures import ratio
from loadtest.measures import PROMPT, names
from loadtest.run import Run

# seconds between requests: while one is taken in the server looks at no other, and does not know that it came
_APART = 0.002


async def streams(run: Run) -> None:
    """32 tenants stream at once, against the worker's own loop and against one request at a time, in turns."""
    tenants, tokens = names("s", 32), max(16, round(128 * min(1.0, run.scale * 2)))
    body = {
        "prompt": PROMPT,
        "ignore_eos": True,
        "return_token_ids": True,
        "temperature": 0.0,
        "stream": True,
    }

    async def ask(number: int, tenant: str, count: int, group: str) -> Answer:
        await asyncio.sleep(number * _APART)
        return await run.client.ask("generate", tenant, body | {"max_tokens": count}, group=group)

    async def over_http(at_once: Sequence[str], count: int) -> float:
        began = time.monotonic()
        group = f"{len(at_once)} at once"
        answers = await asyncio.gather(*(ask(n, t, count, group) for n, t in enumerate(at_once)))
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
            statistics.mean([await over_http(tenants[i : i + 1], tokens) for i in range(4)])
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
