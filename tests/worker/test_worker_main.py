"""The worker's process ends when its loop does, however that ends, and tells why it could not begin."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import zmq

from app.messages import Fatal, decode_answers
from app.settings import Settings

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


LACKS = """
import sys, torch
import app.worker.process as process

def build(*_):
    raise {error}

process.build = build
# its input ends behind the settings, and it is to last until it has told
process.exit_with_parent = lambda: None
sys.argv = ["app.worker", "--endpoint", sys.argv[1]]
sys.exit(process.main())
"""


@pytest.mark.parametrize(
    ("error", "told"),
    [
        ("torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 16 GiB.')", "lower --resident-bytes"),
        ("RuntimeError('the driver says no')", "could not be built: the driver says no"),
    ],
)
def test_what_torch_says_while_a_worker_is_built_is_told(tmp_path: Path, error: str, told: str) -> None:
    endpoint = f"ipc://{tmp_path}/worker"
    settings = Settings(store=f"disk://{tmp_path}/store", device="cpu")
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.bind(endpoint)
        ended = subprocess.run(
            [sys.executable, "-c", LACKS.format(error=error), endpoint],
            input=settings.model_dump_json() + "\n",
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert socket.poll(10_000), ended.stderr
        _, frame = socket.recv_multipart()
    (answer,) = decode_answers(frame)
    assert isinstance(answer, Fatal)
    assert told in answer.message
    assert ended.returncode == 1
    assert ("Traceback" in ended.stderr) == ("driver" in error)
