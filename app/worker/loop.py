"""The worker process's loop: frames from the API in, steps, frames out; background threads beside it."""

from __future__ import annotations

import contextvars
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import structlog
import zmq

from app.errors import ServiceError
from app.messages import WORKER_LAST_SECONDS, Answer, Drain, decode_requests, encode
from app.worker.engine import Engine
from app.worker.heap import Heap, trimmer

log = structlog.get_logger("worker")

Done = Callable[[object, ServiceError | None], None]
HEARTBEAT_SECONDS = 1.0
POLL_MILLISECONDS = 100
# three loads, two transfers and two looks at once, and always some left for commits
BACKGROUND_THREADS = 10


class Background:
    """Threads for what would hold up the loop. Results come back through ``drain``, in the loop's thread."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(BACKGROUND_THREADS, thread_name_prefix="background")
        self._results: SimpleQueue[Callable[[], None]] = SimpleQueue()
        # a byte on this socket wakes the loop's poll
        self.wake, self._bell = socket.socketpair()
        self.wake.setblocking(False)
        self._bell.setblocking(False)

    def submit(self, work: Callable[[], object], done: Done) -> None:
        """``work`` in a thread, then ``done`` in the loop's; both log about the job that is logged about here."""
        context = contextvars.copy_context()
        self._threads.submit(context.run, self._run, work, done, context.copy())

    def _run(self, work: Callable[[], object], done: Done, context: contextvars.Context) -> None:
        result: object = None
        error: ServiceError | None = None
        try:
            result = work()
        except ServiceError as raised:
            error = raised
        except Exception:
            log.exception("background work failed")
            error = ServiceError("an internal error; the server's log has the details")
        self._results.put(lambda: context.run(done, result, error))
        try:
            self._bell.send(b"x")
        except BlockingIOError:
            return  # the bell is full of rings already

    def drain(self) -> None:
        """Hands over the results that have come."""
        try:
            while self.wake.recv(4096):
                pass
        except BlockingIOError:
            pass
        while not self._results.empty():
            self._results.get()()

    def close(self) -> None:
        self._threads.shutdown(wait=True)
        self.wake.close()
        self._bell.close()


class Loop:
    """Runs an engine against a ZeroMQ endpoint until it has drained or its parent is gone."""

    def __init__(self, endpoint: str, background: Background) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.set(zmq.SNDHWM, 0)
        self._socket.set(zmq.RCVHWM, 0)
        self._socket.set(zmq.LINGER, 1000)
        self._socket.connect(endpoint)
        self._background = background
        self._heap = Heap(background.submit, trimmer())
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(background.wake, zmq.POLLIN)
        self._drain_until: float | None = None

    def send(self, answers: list[Answer]) -> None:
        self._socket.send(encode(answers))

    def _receive(self, engine: Engine) -> None:
        while self._socket.poll(0):
            for message in decode_requests(self._socket.recv()):
                if isinstance(message, Drain):
                    self._drain_until = time.monotonic() + message.seconds
                engine.handle(message)

    def run(self, engine: Engine) -> None:
        """Returns when a Drain has been carried out."""
        beat = 0.0
        busy = False
        while True:
            if not busy:
                self._poller.poll(POLL_MILLISECONDS)
            self._receive(engine)
            self._background.drain()
            busy = engine.step()
            if engine.outbox:
                self.send(engine.outbox)
                engine.outbox = []
            now = time.monotonic()
            if now - beat >= HEARTBEAT_SECONDS:
                beat = now
                self._heap.step(now)
                self.send([engine.stats()])
            if self._drain_until is None:
                continue
            if engine.idle or now >= self._drain_until + WORKER_LAST_SECONDS:
                return
            if now >= self._drain_until and not engine.ended:
                engine.end()
                busy = True

    def close(self) -> None:
        self._background.close()
        self._socket.close()
        self._context.term()


def exit_with_parent() -> None:
    """Ends this process when its standard input closes: a killed server takes its workers along.

    Nothing is lost by it; what was acknowledged is in the store.
    """

    def watch() -> None:
        while sys.stdin.buffer.read(4096):
            pass
        import os

        os._exit(0)

    threading.Thread(target=watch, daemon=True, name="parent-watch").start()
