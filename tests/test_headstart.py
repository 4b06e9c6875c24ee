"""A worker that is started ahead of the process that will run it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from app import headstart

WAITING = (sys.executable, "-S", "-c", "import sys; sys.stdin.read()", "--")


def test_a_worker_that_nobody_takes_ends_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headstart, "WORKER", WAITING)
    headstart.begin()
    [begun] = headstart._begun
    assert begun.process.poll() is None
    headstart.drop()
    assert begun.process.poll() is not None
    assert not begun.directory.exists()
    assert headstart.take() is None


def test_a_worker_is_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headstart, "WORKER", WAITING)
    headstart.begin()
    begun = headstart.take()
    assert begun is not None
    headstart.drop()
    assert begun.process.poll() is None
    begun.drop()


def test_a_worker_that_cannot_be_started_is_left_to_the_supervisor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headstart, "WORKER", ("/nowhere/python",))
    headstart.begin()
    assert headstart.take() is None


def test_a_worker_whose_starter_ended_before_it_had_settings_ends_quietly() -> None:
    command = [sys.executable, "-m", "app.worker", "--endpoint", "ipc:///nowhere"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_nothing_but_the_standard_library_is_imported_before_it() -> None:
    code = "import sys, app.cli; print(sorted(m for m in ('torch', 'typer', 'pydantic', 'zmq') if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stdout.strip() == b"[]"
