"""Neither process looks for garbage in what it was started with: a tenth of a second, in which nobody is answered; and
the worker lets the API go first."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.server.process import ServerProcess, until

# imported by every Python that finds it: notes once how much the process has put out of the collector's sight
WATCH = """
import gc, os, sys, threading, time

def watch():
    while not gc.get_freeze_count():
        time.sleep(0.05)
    with open(os.environ["FROZEN"], "a") as file:
        print(os.getpid(), gc.get_freeze_count(), file=file)

threading.Thread(target=watch, daemon=True).start()
"""


def test_what_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(WATCH)
    frozen = tmp_path / "frozen"
    frozen.touch()
    monkeypatch.setenv("FROZEN", str(frozen))
    path = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    with ServerProcess(tmp_path / "store") as server:
        pids = {server.process.pid, server.worker_pid}
        api, worker = (
            os.getpriority(os.PRIO_PROCESS, pid) for pid in (server.process.pid, server.worker_pid)
        )
        # lines of a file that is being written may be half there
        until(lambda: frozen.read_text().count("\n") >= len(pids), "a line of each process")
        counts = dict(map(int, line.split()) for line in frozen.read_text().splitlines())
    assert set(counts) == pids
    assert min(counts.values()) > 50_000
    assert worker == min(19, api + 10)
