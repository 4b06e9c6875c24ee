"""Processes that an experiment starts: they end when it does, and do not go on by themselves."""

from __future__ import annotations

import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

# a server that is asked to end finishes what it is at
PATIENCE = 90.0


@contextmanager
def orderly() -> Iterator[None]:
    """Within it SIGTERM ends this process by an exception, so that what it has started can be ended first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def started(command: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that does not outlast the block, whatever ends that."""
    with orderly():
        child = subprocess.Popen(command)
        try:
            yield child
        finally:
            if child.poll() is None:
                child.terminate()
                try:
                    child.wait(PATIENCE)
                except subprocess.TimeoutExpired:
                    child.kill()
                    child.wait()


def run(command: Sequence[str]) -> int:
    """Runs it to its end; returns what it exits with."""
    with started(command) as child:
        return child.wait()
