"""A worker that is started ahead of the process that will run it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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


@pytest.mark.skipif(
    not Path("/proc/self/environ").exists(), reason="Linux tells what a process was started with"
)
@pytest.mark.parametrize("own", [None, "7"])
def test_a_worker_has_few_heaps_unless_it_is_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, own: str | None
) -> None:
    monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
    if own is not None:
        monkeypatch.setenv("MALLOC_ARENA_MAX", own)
    process = headstart.start(WAITING, "ipc:///nowhere")
    try:
        told = Path(f"/proc/{process.pid}/environ").read_text().split("\0")
        assert f"MALLOC_ARENA_MAX={own or 2}" in told
    finally:
        process.kill()
        process.communicate()


def test_a_worker_whose_starter_ended_before_it_had_settings_ends_quietly() -> None:
    command = [sys.executable, "-m", "app.worker", "--endpoint", "ipc:///nowhere"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_a_worker_is_ours_wherever_it_is_started(tmp_path: Path) -> None:
    root = Path(headstart.__file__).parent.parent
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "__init__.py").write_text("raise SystemExit('another app')")
    (tmp_path / "argparse.py").write_text("raise SystemExit('another argparse')")
    code = (
        "import subprocess, sys; from app.headstart import WORKER; "
        "sys.exit(subprocess.run([*WORKER, '--endpoint', 'ipc:///nowhere'], stdin=subprocess.DEVNULL).returncode)"
    )
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_nothing_but_the_standard_library_is_imported_before_it() -> None:
    code = "import sys, app.cli; print(sorted(m for m in ('torch', 'typer', 'pydantic', 'zmq') if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stdout.strip() == b"[]"
