"""Keeps a worker process alive: starts it, listens to it, replaces it when it dies or hangs."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import subprocess
import time
from collections.abc import Sequence
from typing import cast

import msgspec
import structlog
import zmq
import zmq.asyncio

from app.api.worker import WorkerClient
from app.headstart import WORKER, Begun, endpoint, private_directory, start
from app.messages import decode_answers
from app.settings import Settings

log = structlog.get_logger("api")

# a worker that was ready for this long did not fail quickly
STEADY_SECONDS = 60.0
MOST_QUICK_FAILURES = 5
_FIRST_BACKOFF = 0.5
_LAST_WORDS = 0.2
_LONGEST_BACKOFF = 30.0


class WorkerCannotStart(Exception):
    """The first worker ended before it was ready: the settings or the model are wrong, and a retry won't help."""


class Supervisor:
    """Runs one worker, incarnation after incarnation, and keeps ``client`` connected to it.

    Each incarnation has an endpoint of its own in a private directory, so that nothing a dead worker has
    sent or not taken can reach its successor. The worker ends when its standard input closes, which the
    kernel sees to when this process is killed.
    """

    def __init__(
        self,
        settings: Settings,
        client: WorkerClient,
        *,
        command: Sequence[str] = WORKER,
        begun: Begun | None = None,
    ) -> None:
        """``begun`` is a worker that was started ahead, and becomes the first one."""
        self._settings = settings
        self._client = client
        self._command = tuple(command)
        self._context = zmq.asyncio.Context()
        self._begun = begun
        self._directory = private_directory() if begun is None else begun.directory
        self._incarnation = 0
        self._was_ready = False
        self._process: subprocess.Popen[bytes] | None = None
        # set once the first process runs
        self.started = asyncio.Event()

    @property
    def pid(self) -> int | None:
        """The running worker's process id."""
        return self._process.pid if self._process is not None else None

    async def run(self) -> None:
        """Returns when a drained worker has ended. Raises WorkerCannotStart if the first one never got ready.

        Cancelling it kills the worker.
        """
        failures = 0
        try:
            while True:
                began = time.monotonic()
                reason = await self._one_life()
                if self._client.draining:
                    return
                if not self._was_ready:
                    raise WorkerCannotStart(reason)
                failures = 1 if time.monotonic() - began > STEADY_SECONDS else failures + 1
                if failures >= MOST_QUICK_FAILURES:
                    reason = f"the worker failed {failures} times in a row; the last time {reason}"
                self._client.reason = reason
                pause = min(_FIRST_BACKOFF * 2 ** (failures - 1), _LONGEST_BACKOFF)
                log.error("worker ended", reason=reason, restart_in=pause)
                self._client.metrics.restarts.inc()
                self._client.delayed(pause)
                await asyncio.sleep(pause)
        finally:
            if self._begun is not None:
                self._begun.drop()
            self._context.destroy(linger=0)
            shutil.rmtree(self._directory, ignore_errors=True)

    async def _one_life(self) -> str:
        """From start to end of one worker process; how it ended."""
        self._incarnation += 1
        here = endpoint(self._directory, self._incarnation)
        socket = self._context.socket(zmq.DEALER)
        for option in (zmq.SNDHWM, zmq.RCVHWM, zmq.LINGER):
            socket.setsockopt(option, 0)
        reason = "the worker ended"
        try:
            socket.bind(here)
            begun, self._begun = self._begun, None
            process = self._process = start(self._command, here) if begun is None else begun.process
            self.started.set()
            try:
                reason = await self._watch(process, socket)
            finally:
                await _end(process)
        finally:
            self._process = None
            self._client.detach(reason)
            socket.close(linger=0)
        return reason

    async def _watch(self, process: subprocess.Popen[bytes], socket: zmq.asyncio.Socket) -> str:
        """Until the process ends, or has to. Returns how it ended, in words."""
        client = self._client

        def send(frame: bytes) -> None:
            # there is no high-water mark: a frame waits only if the worker is gone, and then it is lost with it
            future = cast("asyncio.Future[object]", socket.send(frame))
            future.add_done_callback(lambda done: done.cancelled() or done.exception())

        assert process.stdin is not None
        client.attach(send, time.monotonic())
        with contextlib.suppress(ConnectionError):
            # they fit into an empty pipe
            process.stdin.write(self._settings.model_dump_json().encode() + b"\n")
            process.stdin.flush()
        listener = asyncio.create_task(self._listen(socket))
        exit = asyncio.create_task(asyncio.to_thread(process.wait))
        deadline = asyncio.create_task(self._silence())
        try:
            await asyncio.wait([listener, exit, deadline], return_when=asyncio.FIRST_COMPLETED)
            if exit.done():
                # what it sent before it ended is still to be read: answers, or why it could not go on
                heard = None
                while heard != client.last_heard and not listener.done():
                    heard = client.last_heard
                    await asyncio.wait([listener], timeout=_LAST_WORDS)
                return client.fatal or f"the worker ended with exit code {exit.result()}"
            if listener.done():
                return f"the worker sent something that cannot be read ({listener.exception()})"
            return deadline.result()
        finally:
            for task in (listener, exit, deadline):
                task.cancel()
            await asyncio.gather(listener, exit, deadline, return_exceptions=True)

    async def _listen(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            frame: bytes = await socket.recv()
            try:
                answers = decode_answers(frame)
            except msgspec.MsgspecError as error:
                raise ValueError(str(error)) from error
            self._client.received(answers, time.monotonic())

    async def _silence(self) -> str:
        """Returns when the worker does not become ready, or has been silent for too long; which of them."""
        client, settings = self._client, self._settings
        while not client.settled.is_set():
            left = client.loading_since + settings.start_timeout - time.monotonic()
            if left <= 0:
                return f"the worker was not ready within {settings.start_timeout:g} s"
            # not wait_for: on Python 3.11 it can swallow a cancellation
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await client.settled.wait()
        if client.model is None:
            return client.reason
        self._was_ready = True
        log.info("worker ready", model=client.model.name, device=client.model.device, pid=self.pid)
        while True:
            left = client.last_heard + settings.heartbeat_timeout - time.monotonic()
            if left <= 0:
                return f"the worker was silent for {settings.heartbeat_timeout:g} s"
            await asyncio.sleep(left)


async def _end(process: subprocess.Popen[bytes]) -> None:
    """Kills the process if it still runs. What it acknowledged is durable, so nothing is lost by that."""
    process.kill()
    await asyncio.to_thread(process.wait)
    assert process.stdin is not None
    with contextlib.suppress(ConnectionError):
        process.stdin.close()
