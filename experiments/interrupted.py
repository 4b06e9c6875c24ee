"""What becomes of integrity's log outside its run: it is killed and goes on, or is forgotten."""

from __future__ import annotations

import sys
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import BinaryIO

import httpx

from experiments.children import run, started
from experiments.client import Client
from experiments.journal import AnotherRun, claimed, head_of
from experiments.session import forget

# lines of the log: the run was killed here; its memories have been erased
KILLED, ERASED = b"killed", b"erased"


def killed_and_resumed(path: Path, words: list[str], kill_at: int) -> int:
    """Runs this command as a process of its own, kills that behind ``kill_at`` answers, and runs it again.

    Raises SystemExit if another run is at the log.
    """
    command = [sys.executable, "-m", "experiments.integrity", *words, "--child"]
    if lines(path) <= kill_at:
        with started(command) as child:
            while child.poll() is None and lines(path) <= kill_at:
                time.sleep(0.02)
            killed = child.poll() is None
            if killed:
                child.kill()
            child.wait()
        if not killed:
            return child.returncode
        with alone(path) as log:
            whole = log.read()
            log.truncate(whole.rfind(b"\n") + 1)
            log.seek(0, 2)
            log.write(KILLED + b"\n")
        print(f"killed behind {lines(path) - 2} answers; going on", file=sys.stderr)
    return run(command)


def alone(path: Path) -> BinaryIO:
    """The log's file. Raises SystemExit if another run is at it."""
    try:
        return claimed(path)
    except AnotherRun as error:
        raise SystemExit(str(error)) from None


async def forgotten(urls: list[str], path: Path) -> None:
    """Forgets what an earlier run has measured, and erases what it has left.

    Raises SystemExit if that had more servers: its memories would stay in them; or if it still goes on.
    """
    had = head_of(path).get("settings", {}).get("servers", 1)
    if had > len(urls):
        raise SystemExit(
            f"{path} is of {had} servers: name them all, by --url and --also, or its memories stay in them"
        )
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(Client(url, 2)) for url in urls]
        try:
            await forget(clients, "integrity", path)
        except (AnotherRun, httpx.HTTPError) as error:
            raise SystemExit(str(error)) from None


def lines(path: Path) -> int:
    """Whole lines so far, the head among them."""
    return path.read_bytes().count(b"\n") if path.exists() else 0
