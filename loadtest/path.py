"""What the worker spends on a step and on an update with its question, without HTTP; beside another checkout if wanted.

    python -m loadtest.path                        # processor time, 32 tenants and one
    python -m loadtest.path --beside ../checkout   # in turns with the code there, and the ratio
    python -m loadtest.path --profile              # where it goes, function by function

Processor time, because a machine with other work on it makes wall-clock time mean little.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import random
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from app.api.tokens import Tokenizer
from app.messages import Answer, Context, Failed, Finished, Generate, Sampling, Update, Updated
from app.model.checkpoint import resolve
from app.settings import Settings
from app.store.disk import DiskStore
from app.worker.build import build
from app.worker.loop import Background

NAMES = ["Mira Tolvan", "Joss Ardel", "Pelin Okoro", "Sanna Brevik", "Tomas Ulrich", "Quill Hadar"]
TOWNS = ["Tarnovik", "Oslo", "Belmora", "Kesh", "Antwerp", "Sarnia"]
QUESTION = "Where does Mira Tolvan live?"
TOKENS = 24
ROUNDS = 3


class Engaged:
    """An engine whose tenants have had updates, so that their pools and copies lie as they come to lie."""

    def __init__(self, scratch: str, tenants: int) -> None:
        self.background = Background()
        wanted: dict[str, Any] = {"resident_bytes": 600 * 2**20, "max_running": 64, "threads": 1}
        settings = Settings(**wanted)
        self.engine = build(settings, DiskStore(Path(scratch) / "store"), self.background.submit).engine
        tokenizer = Tokenizer.load(resolve("pocket"))
        assert tokenizer is not None
        self.tokenizer, self.tenants, self.number = tokenizer, tenants, 0
        self.random = random.Random(1)
        self.asked(tenants, 2)

    def pump(self, on: Callable[[Answer], None]) -> None:
        engine = self.engine
        self.background.drain()
        if not engine.step() and not engine.outbox:
            select.select([self.background.wake], [], [], 1.0)
        answers, engine.outbox = engine.outbox, []
        for answer in answers:
            if isinstance(answer, Failed):
                raise RuntimeError(answer.message)
            on(answer)

    def update(self, tenant: str) -> None:
        text = f"{self.random.choice(NAMES)} lives in {self.random.choice(TOWNS)}."
        ids = (4 * self.tokenizer.ids(text))[: max(16, len(self.tokenizer.ids(text)))]
        self.number += 1
        self.engine.handle(Update(f"{tenant}/{self.number}", tenant, [Context(ids, text)]))

    def generate(self, tenant: str, text: str, tokens: int, stop: tuple[int, ...] = ()) -> None:
        self.number += 1
        sampling = Sampling(tokens, temperature=0.0, stop_tokens=stop)
        self.engine.handle(Generate(f"{tenant}/{self.number}", tenant, self.tokenizer.ids(text), sampling))

    def decode(self, tenants: int) -> dict[str, float]:
        """Steps in which all of them decode, mostly."""
        finished = 0

        def on(answer: Answer) -> None:
            nonlocal finished
            finished += isinstance(answer, Finished)

        for number in range(tenants):
            self.generate(f"t{number}", QUESTION, TOKENS)
        steps, begin = self.engine.numbers.counters["steps_total"], time.process_time()
        while finished < tenants:
            self.pump(on)
        return {
            "count": self.engine.numbers.counters["steps_total"] - steps,
            "seconds": time.process_time() - begin,
        }

    def asked(self, tenants: int, rounds: int = ROUNDS) -> dict[str, float]:
        """Each tenant's updates one after another, a question behind each."""
        left = dict.fromkeys((f"t{number}" for number in range(tenants)), rounds)

        def on(answer: Answer) -> None:
            if isinstance(answer, Updated):
                self.generate(answer.id.split("/")[0], QUESTION, 16, stop=(1,))
            elif isinstance(answer, Finished):
                tenant = answer.id.split("/")[0]
                left[tenant] -= 1
                if left[tenant]:
                    self.update(tenant)

        begin = time.process_time()
        for tenant in left:
            self.update(tenant)
        while any(left.values()):
            self.pump(on)
        return {"count": tenants * rounds, "seconds": time.process_time() - begin}


def _serve(tenants: int) -> None:
    with tempfile.TemporaryDirectory(prefix="loadtest-") as scratch:
        path = Engaged(scratch, tenants)
        print(json.dumps("ready"), flush=True)
        for line in sys.stdin:
            name, count = json.loads(line)
            print(json.dumps(getattr(path, name)(count)), flush=True)
        path.background.close()


def _profile(tenants: int) -> None:
    with tempfile.TemporaryDirectory(prefix="loadtest-") as scratch:
        path = Engaged(scratch, tenants)
        for name in ("decode", "asked"):
            profile = cProfile.Profile(time.thread_time)
            told = profile.runcall(getattr(path, name), tenants)
            print(f"{name}: {told}")
            pstats.Stats(profile).sort_stats("tottime").print_stats(25)
        path.background.close()


def _compare(checkouts: list[Path], tenants: int, rounds: int) -> None:
    processes = []
    for checkout in checkouts:
        code = Path(__file__).read_text()
        process = subprocess.Popen(
            [sys.executable, "-c", code, "--serve", "--tenants", str(tenants)],
            cwd=checkout,
            env=os.environ | {"PYTHONPATH": str(checkout)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        process.stdout.readline()
        processes.append(process)
    cases = [("decode", 1), ("decode", tenants), ("asked", 1), ("asked", tenants)]
    found: dict[tuple[str, int], list[list[float]]] = {case: [[] for _ in checkouts] for case in cases}
    for turn in range(rounds):
        for case in cases:
            order = range(len(checkouts))
            for index in reversed(order) if turn % 2 else order:
                told = _call(processes[index], case)
                found[case][index].append(1000 * told["seconds"] / told["count"])
    for case, values in found.items():
        medians = [statistics.median(each) for each in values]
        ratio = statistics.median(a / b for a, b in zip(values[-1], values[0], strict=True))
        what = "a step" if case[0] == "decode" else "an update and its question"
        shown = " against ".join(f"{median:.1f}" for median in medians)
        print(f"{what}, {case[1]} tenants: {shown} ms" + (f", {ratio:.2f} times" if len(medians) > 1 else ""))
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(20)


def _call(process: subprocess.Popen[str], case: tuple[str, int]) -> dict[str, Any]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(case) + "\n")
    process.stdin.flush()
    answer: dict[str, Any] = json.loads(process.stdout.readline())
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tenants", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--beside", type=Path, help="another checkout, measured in turns")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        _serve(given.tenants)
    elif given.profile:
        _profile(given.tenants)
    else:
        beside = [] if given.beside is None else [given.beside.resolve()]
        _compare([Path(__file__).parents[1], *beside], given.tenants, given.rounds)


if __name__ == "__main__":
    main()
