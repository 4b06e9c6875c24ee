"""What a run has measured so far, a line each, so that a run that was killed goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class OtherSettings(Exception):
    """The log is of a run with other settings: its figures may not be mixed with these."""


def run_of(path: Path) -> str | None:
    """The name of the run that a log is of, if there is one."""
    try:
        run: str = json.loads(path.read_bytes().partition(b"\n")[0])["run"]
    except (OSError, ValueError):
        return None
    return run


def remove(path: Path) -> None:
    path.unlink(missing_ok=True)


class Log:
    """Append-only lines. The first says what was measured and how; a line torn by a kill is dropped."""

    def __init__(self, path: Path, settings: dict[str, Any], run: str) -> None:
        """Opens the log of the same ``settings``, or begins one, of which ``run`` is the name.

        Raises OtherSettings.
        """
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = path.read_bytes() if path.exists() else b""
        whole = kept[: kept.rfind(b"\n") + 1]
        first, *self.lines = whole.splitlines() or [b""]
        if first:
            head = json.loads(first)
            if head["settings"] != json.loads(json.dumps(settings)):
                raise OtherSettings(f"{path} is of a run with other settings; --fresh begins anew")
            run = head["run"]
        self.run: str = run
        self._file = path.open("r+b" if kept else "wb")
        self._file.truncate(len(whole))
        self._file.seek(0, 2)
        if not first:
            self.write(json.dumps({"settings": settings, "run": run}).encode())

    def write(self, line: bytes) -> None:
        """Appends a line; it is with the kernel when this returns."""
        self._file.write(line + b"\n")
        self._file.flush()

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
