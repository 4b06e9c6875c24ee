"""The parts of the breaking bench by name. Each takes (scale, seed, progress) and gives its rows of the table."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.faults import exploration
from tests.faults.kills import Bench, Kills
from tests.faults.ledger import Violation
from tests.faults.mutants import MUTANTS, caught
from tests.faults.report import Row
from tests.faults.servers import zygote

Progress = Callable[[str], None]
Part = Callable[[float, int, Progress], list[Row]]


def scaled(number: int, scale: float) -> int:
    return max(1, round(number * scale))


def states(scale: float, seed: int, progress: Progress) -> list[Row]:
    wanted = scaled(100_000, scale)
    progress(f"{wanted} states")
    details = {}
    try:
        found = exploration.explore(wanted, first_seed=seed * 1_000_000)
        good, reached = found.states >= wanted, f"{found.states:,} states, 0"
        details = {"crashes": found.crashes, "scripts": found.scripts, "failures": found.failures}
    except exploration.Violation as error:
        good, reached = False, f"broken: {error}"
    return [
        Row(
            "crash states explored with the fake file system, acknowledged updates lost or doubled",
            "100,000 states, 0",
            "1,000,000, 0",
            reached,
            good,
            details,
        )
    ]


def seeded(scale: float, seed: int, progress: Progress) -> list[Row]:
    names = list(MUTANTS)[: scaled(len(MUTANTS), scale)]
    missed = []
    for count, name in enumerate(names):
        progress(f"{count} of {len(names)}")
        if not caught(name):
            missed.append(name)
    reached = f"{len(names) - len(missed)} of {len(names)}"
    return [Row("seeded bugs caught", "10 of 10", "30 of 30", reached, not missed, {"missed": missed})]


def kills(scale: float, seed: int, progress: Progress) -> list[Row]:
    wanted = scaled(500, scale)
    broken = ""

    def told(done: Kills) -> None:
        progress(f"{done.cycles} of {wanted} cycles, {done.updates} updates acknowledged")

    with tempfile.TemporaryDirectory(prefix="faults-") as name, zygote(Path(name)) as forks:
        store = Path(name) / "store"
        bench = Bench(f"disk://{store}", store, forks, seed)
        try:
            bench.run(wanted, told, cold_every=max(2, wanted // 20))
        except Violation as error:
            broken = str(error)
    return [row_of(bench.done, "on disk", wanted, broken)]


def row_of(done: Kills, where: str, wanted: int, broken: str) -> Row:
    kinds = (
        f"API {done.by.get('API', 0)}, worker {done.by.get('worker', 0)}, both {done.by.get('both', 0)}; "
        f"{done.cold} servers started cold, the others forked"
    )
    result = broken or f"{done.updates:,} updates acknowledged, 0 lost, 0 doubled"
    return Row(
        f"`kill -9` of the server under load, memories {where}",
        "500 cycles, 0 lost, 0 doubled",
        "10,000",
        f"{done.cycles:,} cycles ({kinds}): {result}",
        not broken and done.cycles >= wanted,
        vars(done),
    )


PARTS: dict[str, Part] = {
    "states": states,
    "seeded": seeded,
    "kills": kills,
}
