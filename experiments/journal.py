"""What a run has measured so far, a line each, so that a run that was killed goes on where it was."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any, BinaryIO


class OtherSettings(Exception):
    """The log is of a run with other settings: its figures may not be mixed with these."""


class AnotherRun(Exception):
    """Another process writes this log: two at once would measure, and erase, in the same memories."""


def head_of(path: Path) -> dict[str, Any]:
    """The first line of a log: its "run" and "settings"; nothing if there is no log."""
    try:
        head: dict[str, Any] = json.loads(path.read_bytes().partition(b"\n")[0])
    except (OSError, ValueError):
        return {}
    return head


def judged(settings: dict[str, Any]) -> str:
    """By which rule answers were judged; what does not say so is from when each kind of text had one of its own."""
    rule: str = settings.get("judge") or ("holds" if settings.get("squad") else "exact")
    return rule


def differing(kept: dict[str, Any], given: dict[str, Any]) -> list[str]:
    """The settings in which a log's are others. What an older log does not tell is not compared."""
    if "judge" in given:
        kept = {"judge": judged(kept), "stop": None} | kept
    return sorted(name for name in kept if kept[name] != given.get(name))


def claimed(path: Path) -> BinaryIO:
    """The log's file, made if there is none, for this process alone until it is closed. Raises AnotherRun."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise AnotherRun(f"another run is at {path}") from None
    except OSError:
        pass  # a file system without locks
    return file


class Log:
    """Append-only lines. The first says what was measured and how; a line torn by a kill is dropped."""

    def __init__(self, path: Path, settings: dict[str, Any], run: str) -> None:
        """Opens the log of the same ``settings``, or begins one, of which ``run`` is the name.

        Raises OtherSettings and AnotherRun.
        """
        self.path = path
        self.written = 0
        self._file = claimed(path)
        try:
            self._read(settings, run)
        except BaseException:
            self._file.close()
            raise

    def _read(self, settings: dict[str, Any], run: str) -> None:
        kept = self._file.read()
        whole = kept[: kept.rfind(b"\n") + 1]
        first, *self.lines = whole.splitlines() or [b""]
        if first:
            head = json.loads(first)
            others = differing(head["settings"], json.loads(json.dumps(settings)))
            if others:
                raise OtherSettings(
                    f"{self.path} is of a run with other settings ({', '.join(others)}); --fresh begins anew"
                )
            run = head["run"]
        self.run: str = run
        self._file.truncate(len(whole))
        self._file.seek(0, 2)
        if not first:
            self.write(json.dumps({"settings": settings, "run": run}).encode())
            self.written = 0

    def write(self, line: bytes) -> None:
        """Appends a line; it is with the kernel when this returns. ``written`` counts them."""
        self._file.write(line + b"\n")
        self._file.flush()
        self.written += 1

    def close(self) -> None:
        self._file.close()


class Journal:
    """A log of items by name, each with what was measured of it, as JSON."""

    def __init__(self, log: Log) -> None:
        self._log = log
        told = [json.loads(line) for line in log.lines]
        self.items: dict[str, Any] = {line["item"]: line["measured"] for line in told}

    def add(self, item: str, measured: Any) -> None:
        self.items[item] = measured
        self._log.write(json.dumps({"item": item, "measured": measured}, ensure_ascii=False).encode())
