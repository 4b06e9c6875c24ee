"""A worker on the CPU steps back, and only so far as it may."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

STEP = """
import os, sys, threading
from pathlib import Path
from app.worker.priority import step_back
before = os.nice(0)
step_back(int(sys.argv[1]), Path(sys.argv[2]))
found = []
thread = threading.Thread(target=lambda: found.append(os.nice(0)))
thread.start()
thread.join()
print(os.nice(0) - before, found[0] - before)
"""


def possible(niceness: int) -> str:
    """No process steps back further than 19, whatever these tests were started with."""
    return str(min(niceness, 19 - os.nice(0)))


@pytest.mark.parametrize("niceness", [0, 3])
def test_it_and_what_it_starts_step_back(niceness: int, tmp_path: Path) -> None:
    group = tmp_path / "autogroup"
    ran = subprocess.run(
        [sys.executable, "-c", STEP, str(niceness), str(group)], capture_output=True, text=True, check=True
    )
    assert ran.stdout.split() == [possible(niceness)] * 2
    assert group.exists() == bool(niceness)


def test_a_system_without_groups_is_none_the_worse(tmp_path: Path) -> None:
    absent = tmp_path / "no such folder" / "autogroup"
    ran = subprocess.run(
        [sys.executable, "-c", STEP, "1", str(absent)], capture_output=True, text=True, check=True
    )
    assert ran.stdout.split() == [possible(1)] * 2
