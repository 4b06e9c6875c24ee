"""SIGTERM under load, again and again on one store: what was acknowledged is there, and every stream has an end."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from loadtest.client import Client
from loadtest.measures import PROMPT
from loadtest.people import fact
from loadtest.run import MODEL, Run
from loadtest.server import Server

TIMES = 100
STREAMS, WRITERS = 12, 6


async def drain(run: Run) -> None:
    """The scenario's own server is left alone; those that are stopped come one after another."""
    times = max(2, round(TIMES * run.scale))
    acknowledged: dict[str, int] = {}
    lost = cut = streams = updates = unanswered = wrong_exits = 0
    log, store = run.directory / "log", run.directory / "drained"
    options = {"model": MODEL, "resident_bytes": "256MiB", "drain_timeout": 20}
    for number in range(times):
        run.progress(f"{number + 1} of {times}")
        server = await asyncio.to_thread(Server, store, log, **options)
        try:
            async with Client(server.url) as client:
                lost += await _missing(client, acknowledged)
                people = asyncio.create_task(_load(run, client, acknowledged))
                await asyncio.sleep(run.rng.uniform(0.2, 1.2))
                server.terminate()
                code = await asyncio.to_thread(server.wait)
                await people
                wrong_exits += code != 0
                for answer in client.answers:
                    # a stream that had begun; one refused with a status has been told
                    if answer.kind == "generate" and answer.status == 200:
                        streams += 1
                        cut += answer.cut
                    updates += answer.kind == "update" and answer.good
                    unanswered += answer.sent > 0 and not answer.status
                run.result.answers += client.answers
        finally:
            await asyncio.to_thread(server.kill)
    with await asyncio.to_thread(Server, store, log, **options) as server:
        async with Client(server.url) as client:
            lost += await _missing(client, acknowledged)
    run.row(
        f"SIGTERM under load, {times} times: acknowledged updates lost, streams cut without a final event",
        "0, 0",
        "",
        f"{lost}, {cut} (of {updates:,} and {streams:,}; sent and not answered: {unanswered}, "
        f"exit code other than 0: {wrong_exits})",
        lost == cut == wrong_exits == unanswered == 0 < min(updates, streams),
        log=_tail(log),
    )


async def _load(run: Run, client: Client, acknowledged: dict[str, int]) -> None:
    """Readers and writers that go on until they are turned away."""

    async def read(number: int) -> None:
        for _ in range(50):
            body = {"prompt": PROMPT, "max_tokens": 96, "ignore_eos": True, "stream": True}
            if not (await client.ask("generate", f"d{number}", body, group="drain")).good:
                return

    async def write(number: int) -> None:
        tenant = f"d{number}"
        for _ in range(200):
            answer = await client.ask("update", tenant, {"text": fact(run.rng)}, group="drain")
            if not answer.good:
                return
            acknowledged[tenant] = max(acknowledged.get(tenant, 0), answer.version)

    await asyncio.gather(*(read(n) for n in range(STREAMS)), *(write(n) for n in range(WRITERS)))


async def _missing(client: Client, acknowledged: dict[str, int]) -> int:
    """Acknowledged versions that are not there."""
    missing = 0
    for tenant, version in acknowledged.items():
        status, body = await client.get(f"/tenants/{tenant}")
        found = json.loads(body)["memory_version"] if status == 200 else 0
        missing += max(0, version - found)
    return missing


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-4000:] if log.exists() else ""
