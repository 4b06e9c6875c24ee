"""A worker that is started before this process has imported what it needs itself: a worker's own imports take longest.

It gets its settings from the supervisor, which takes it over. Nothing but the standard library is imported here.
"""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


def _command() -> tuple[str, ...]:
    """``-m`` looks for modules in the working directory first, which may be anybody's project with an ``app`` of its
    own. Only where this package lies in it, as in a clone, is that right."""
    try:
        here = os.path.samefile(os.getcwd(), Path(__file__).parent.parent)
    except OSError:
        # it was removed
        here = False
    return (sys.executable, *(() if here else ("-P",)), "-m", "app.worker")


WORKER = _command()
# socket paths may have 107 bytes; "/<n>.sock" comes after
_LONGEST_DIRECTORY = 90
# glibc gives every thread a heap of its own, and what the largest memory took that a thread has loaded stays free in it
FEW_HEAPS = {"MALLOC_ARENA_MAX": "2"}


@dataclass(frozen=True)
class Begun:
    """A worker that waits for its settings, and the directory with the socket that it will connect to."""

    process: subprocess.Popen[bytes]
    directory: Path

    def drop(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None
        self.process.stdin.close()
        shutil.rmtree(self.directory, ignore_errors=True)


_begun: list[Begun] = []


def begin() -> None:
    """Starts a worker; one that nobody has taken ends with this process. Where that fails, the supervisor says why."""
    directory = private_directory()
    try:
        process = start(WORKER, endpoint(directory, 1))
    except OSError:
        shutil.rmtree(directory, ignore_errors=True)
        return
    _begun.append(Begun(process, directory))
    atexit.register(drop)


def take() -> Begun | None:
    """The worker that was begun; from here on it is the caller's."""
    return _begun.pop() if _begun else None


def drop() -> None:
    """Ends what was begun and not taken."""
    while (begun := take()) is not None:
        begun.drop()


def start(command: Sequence[str], endpoint: str) -> subprocess.Popen[bytes]:
    """Raises OSError. The environment's own word about heaps counts."""
    return subprocess.Popen(
        [*command, "--endpoint", endpoint],
        env=FEW_HEAPS | os.environ,
        stdin=subprocess.PIPE,
        # a Ctrl-C in the terminal is for the API, which then drains the worker
        start_new_session=True,
    )


def endpoint(directory: Path, incarnation: int) -> str:
    return f"ipc://{directory}/{incarnation}.sock"


def private_directory() -> Path:
    """A new directory that only this user can enter, with a path short enough for sockets."""
    directory = Path(tempfile.mkdtemp(prefix="memoryllm-"))
    if len(str(directory)) > _LONGEST_DIRECTORY:
        directory.rmdir()
        directory = Path(tempfile.mkdtemp(prefix="memoryllm-", dir="/tmp"))
    return directory
