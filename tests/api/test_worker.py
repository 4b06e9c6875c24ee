"""The worker's client and supervisor by themselves: hashing, crash loops, start-up that takes too long."""

from __future__ import annotations

import asyncio
import os
import stat
import sys
import time

import pytest

from app.api import supervisor as module
from app.api.supervisor import Supervisor, WorkerCannotStart
from app.api.worker import WorkerClient, Workers
from app.headstart import Begun, endpoint, private_directory, start
from app.messages import Fetching, Stats
from app.settings import Settings

pytestmark = pytest.mark.anyio

FAKE = (sys.executable, "-m", "tests.api.fake_worker")


async def test_a_tenant_keeps_its_worker() -> None:
    clients = [WorkerClient() for _ in range(4)]
    names = [f"tenant {number}" for number in range(400)]
    four, three = Workers(clients), Workers(clients[:3])
    before = {name: four.of(name) for name in names}
    assert before == {name: four.of(name) for name in names}
    counts = [list(before.values()).count(client) for client in clients]
    assert min(counts) > 50
    # without the last worker, only its tenants move
    moved = [name for name in names if three.of(name) is not before[name]]
    assert moved == [name for name in names if before[name] is clients[3]]


async def test_a_crash_loop_backs_off_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FIRST_BACKOFF", 0.01)
    client = WorkerClient()
    reasons: list[str] = []

    class Crashing(Supervisor):
        async def _one_life(self) -> str:
            self._was_ready = True
            reasons.append(client.reason)
            if len(reasons) > 6:
                client.draining = True
            return "it ended with exit code 9"

    await Crashing(Settings(), client).run()
    assert reasons[1:5] == ["it ended with exit code 9"] * 4
    assert reasons[5] == "the worker failed 5 times in a row; the last time it ended with exit code 9"
    assert reasons[6].startswith("the worker failed 6 times in a row")


async def test_a_worker_that_takes_too_long_to_start() -> None:
    settings = Settings(start_timeout=0.2)
    command = (sys.executable, "-c", "import sys; sys.stdin.read()", "--")
    supervisor = Supervisor(settings, WorkerClient(), command=command)
    with pytest.raises(WorkerCannotStart, match=r"not ready within 0\.2 s"):
        await supervisor.run()
    assert supervisor.pid is None
    assert not supervisor._directory.exists()


async def test_a_download_does_not_count_as_loading() -> None:
    client = WorkerClient()
    supervisor = Supervisor(Settings(start_timeout=0.01), client)
    # the clock does not come so far in this test
    client.attach(lambda frame: None, 0.0)
    client.received([Fetching()], time.monotonic() + 1000)
    watch = asyncio.create_task(supervisor._silence())
    await asyncio.sleep(0.05)
    client.reason = "the tokenizer cannot be loaded"
    client.settled.set()
    assert await watch == "the tokenizer cannot be loaded"
    client.settled.clear()
    client.received([Stats(0.0, {}, {})], time.monotonic() + 1000)
    client.loading_since = 0.0
    assert await supervisor._silence() == "the worker was not ready within 0.01 s"
    supervisor._context.destroy(linger=0)
    supervisor._directory.rmdir()


async def test_cancelling_the_supervisor_ends_the_worker() -> None:
    client = WorkerClient()
    supervisor = Supervisor(Settings(), client, command=FAKE)
    running = asyncio.create_task(supervisor.run())
    await client.settled.wait()
    pid = supervisor.pid
    assert pid is not None
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert not supervisor._directory.exists()


def test_the_directory_is_private_and_its_path_short(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    long = tmp_path_factory.mktemp("x" * 100)
    monkeypatch.setattr("tempfile.tempdir", str(long))
    directory = private_directory()
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert len(str(directory)) < 100
    directory.rmdir()


async def test_a_worker_that_was_started_ahead_becomes_the_first_one() -> None:
    directory = private_directory()
    begun = Begun(start(FAKE, endpoint(directory, 1)), directory)
    client = WorkerClient()
    supervisor = Supervisor(Settings(), client, command=FAKE, begun=begun)
    running = asyncio.create_task(supervisor.run())
    await client.settled.wait()
    assert client.model is not None
    assert supervisor.pid == begun.process.pid
    client.draining = True
    begun.process.kill()
    await running
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert not directory.exists()


async def test_a_worker_started_ahead_ends_with_a_supervisor_that_never_ran_it() -> None:
    directory = private_directory()
    begun = Begun(start(FAKE, endpoint(directory, 1)), directory)
    supervisor = Supervisor(Settings(), WorkerClient(), command=FAKE, begun=begun)
    running = asyncio.create_task(supervisor.run())
    await asyncio.sleep(0)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert begun.process.poll() is not None
    assert not directory.exists()
