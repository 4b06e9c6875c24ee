"""Memory that is free goes back to the system, now and then and not twice at once."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

from app.errors import ServiceError
from app.worker.heap import EVERY_SECONDS, Heap, trimmer

HOLES = """
from pathlib import Path
from app.worker.heap import trimmer

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

trim = trimmer()
# each too small for a mapping of its own, with something behind it that stays
holes = [(x * 100_000, x * 2_000) for x in [bytes([n % 256]) for n in range(400)]]
kept = [small for _, small in holes]
full = resident()
del holes
left = resident()
trim()
print(full - left, left - resident())
"""


class Threads:
    def __init__(self) -> None:
        self.under_way: list[Callable[[object, ServiceError | None], None]] = []

    def submit(self, work: Callable[[], object], done: Callable[[object, ServiceError | None], None]) -> None:
        work()
        self.under_way.append(done)


def test_it_is_given_back_every_so_often_and_not_twice_at_once() -> None:
    threads, times = Threads(), 0

    def trim() -> None:
        nonlocal times
        times += 1

    heap = Heap(threads.submit, trim)
    for second in range(100):
        heap.step(1000.0 + second)
    assert times == 1
    threads.under_way.pop()(None, None)
    heap.step(1100.0)
    threads.under_way.pop()(None, None)
    heap.step(1100.0 + EVERY_SECONDS - 1)
    assert times == 2
    heap.step(1100.0 + EVERY_SECONDS)
    assert times == 3


def test_nothing_is_done_where_there_is_no_such_call() -> None:
    threads = Threads()
    Heap(threads.submit, None).step(0.0)
    assert not threads.under_way


@pytest.mark.skipif(trimmer() is None, reason="the C library has no malloc_trim")
def test_holes_between_what_is_kept_go_back() -> None:
    ran = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True)
    by_itself, trimmed = map(int, ran.stdout.split())
    assert by_itself < 10_000_000
    assert trimmed > 30_000_000
