"""The worker's process ends when its loop does, however that ends."""

from __future__ import annotations

import subprocess
import sys

FAILS = """
import runpy, threading, time
import app.worker.process

def main():
    threading.Thread(target=time.sleep, args=(600,)).start()
    raise RuntimeError("what went wrong")

app.worker.process.main = main
runpy.run_module("app.worker", run_name="__main__")
"""


def test_a_worker_that_fails_does_not_wait_for_what_its_threads_are_at() -> None:
    # far less than its thread takes
    ended = subprocess.run(
        [sys.executable, "-c", FAILS], capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 1
    assert "RuntimeError: what went wrong" in ended.stderr
