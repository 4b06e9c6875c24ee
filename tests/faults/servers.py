"""Servers to be killed: forked from a zygote (see there), or as ``memoryllm serve`` starts them."""

from __future__ import annotations

import http.client
import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
START_SECONDS = 60.0


def until(
    condition: Callable[[], bool], what: str, seconds: float = START_SECONDS, pause: float = 0.005
) -> None:
    """Waits for something that must come."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"this never came: {what}"
        time.sleep(pause)


class Caller:
    """One connection to a server; used by one thread. A transport error raises OSError or HTTPException."""

    def __init__(self, address: tuple[str, int], timeout: float = 30.0) -> None:
        self._connection = http.client.HTTPConnection(*address, timeout=timeout)

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, bytes]:
        sent = None if body is None else json.dumps(body)
        self._connection.request(method, path, sent, {"Content-Type": "application/json"})
        answer = self._connection.getresponse()
        return answer.status, answer.read()

    def get(self, path: str) -> tuple[int, Any]:
        """The answer decoded. A server that is busy, or waits for another's lease, is asked again."""
        end = time.monotonic() + START_SECONDS
        while True:
            try:
                status, data = self.ask("GET", path)
            except http.client.RemoteDisconnected:
                # it had been idle for so long that the server closed it, perhaps just now
                self.close()
                status, data = self.ask("GET", path)
            if status not in (429, 503) or time.monotonic() > end:
                return status, json.loads(data)
            time.sleep(0.05)

    def close(self) -> None:
        self._connection.close()


class Zygote:
    """The forking process. ``workers`` are pids of those it has started and of their servers; ``gone`` have ended."""

    def __init__(self, directory: Path) -> None:
        self._path = str(directory / "zygote.sock")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.zygote", self._path],
            cwd=ROOT,
            env={k: v for k, v in os.environ.items() if not k.startswith("MEMORYLLM_")}
            | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.workers: list[tuple[int, int]] = []
        self.servers: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.gone: set[int] = set()
        ready = threading.Event()
        self._reader = threading.Thread(target=self._read, args=(ready,), daemon=True)
        self._reader.start()
        if not ready.wait(START_SECONDS):
            self.close()
            raise AssertionError("the zygote did not start")

    def _read(self, ready: threading.Event) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            word, *numbers = line.split()
            if word == "ready":
                ready.set()
            elif word == "serve":
                self.servers.put(int(numbers[0]))
            elif word == "work":
                self.workers.append((int(numbers[0]), int(numbers[1])))
            elif word == "end":
                self.gone.add(int(numbers[0]))

    def ask(self, request: dict[str, Any], descriptors: list[int]) -> socket.socket:
        asker = socket.socket(socket.AF_UNIX)
        asker.connect(self._path)
        socket.send_fds(asker, [json.dumps(request).encode()], descriptors)
        return asker

    def close(self) -> None:
        """No child outlives it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)
        self._reader.join(10)
        self._process.stdout.close()


class Server:
    """What both kinds have: an address, and how they are killed. ``ready`` waits for it."""

    address: tuple[str, int] = ("127.0.0.1", 0)
    pid: int
    lines: list[str]

    def worker(self) -> int:
        """The worker's process id."""
        raise NotImplementedError

    def kill(self) -> None:
        """kill -9 of the API alone; its worker must notice by itself."""
        raise NotImplementedError

    def close(self) -> None:
        """Ends whatever of it still runs."""
        raise NotImplementedError

    def kill_worker(self) -> None:
        """The worker alone; returns when the supervisor has started another one."""
        pid = self.worker()
        kill(pid)
        until(lambda: self.worker() != pid, "another worker")

    def kill_both(self) -> None:
        worker = self.worker()
        kill(self.pid)
        kill(worker)
        self.kill()

    def ready(self) -> None:
        caller = Caller(self.address)

        def is_ready() -> bool:
            try:
                return caller.ask("GET", "/ready")[0] == 200
            except (OSError, http.client.HTTPException):
                caller.close()
                return False

        try:
            until(is_ready, "a server that is ready:\n" + "".join(self.lines[-20:]))
        finally:
            caller.close()

    def _listening(self, line: str) -> bool:
        self.lines.append(line)
        del self.lines[:-200]
        found = re.search(r"listening on http://([\d.]+):(\d+)", line)
        if found:
            self.address = (found[1], int(found[2]))
        return bool(found)


def kill(pid: int) -> None:
    # a worker may have noticed the end of its server by itself
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


class ForkedServer(Server):
    """A server whose API and worker are forked from the zygote. It listens when the constructor returns."""

    def __init__(self, zygote: Zygote, **settings: Any) -> None:
        self._zygote = zygote
        ours, theirs = os.pipe()
        self.lines = []
        self._asker = zygote.ask({"serve": {"host": "127.0.0.1", "port": 0, **settings}}, [theirs])
        os.close(theirs)
        self._listens = threading.Event()
        self._reader = threading.Thread(target=self._read, args=(ours,), daemon=True)
        self._reader.start()
        self.pid = zygote.servers.get(timeout=START_SECONDS)
        if not self._listens.wait(START_SECONDS) or not self.address[1]:
            self.close()
            raise AssertionError("the server did not start:\n" + "".join(self.lines))

    def _read(self, descriptor: int) -> None:
        with open(descriptor) as output:
            for line in output:
                if self._listening(line):
                    self._listens.set()
        self._listens.set()

    def worker(self) -> int:
        until(lambda: bool(self._workers()), "a worker")
        return self._workers()[-1]

    def _workers(self) -> list[int]:
        return [pid for pid, server in self._zygote.workers if server == self.pid]

    def kill(self) -> None:
        if self.pid not in self._zygote.gone:
            kill(self.pid)
            until(lambda: self.pid in self._zygote.gone, "the end of a killed server")

    def close(self) -> None:
        self.kill()
        self._asker.close()
        until(lambda: all(pid in self._zygote.gone for pid in self._workers()), "the end of the workers")
        self._reader.join(10)


class StartedServer(Server):
    """``memoryllm serve`` in a process of its own, nothing imported before. It listens when this returns."""

    def __init__(self, **settings: Any) -> None:
        command = [sys.executable, "-m", "app.cli", "serve", "--host", "127.0.0.1", "--port", "0"]
        for name, value in settings.items():
            command += [f"--{name.replace('_', '-')}", str(value)]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MEMORYLLM_")}
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment | {"PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.pid = self._process.pid
        self.lines = []
        self._listens = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._listens.wait(START_SECONDS) or not self.address[1]:
            self.close()
            raise AssertionError("the server did not start:\n" + "".join(self.lines))

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if self._listening(line):
                self._listens.set()
        self._listens.set()

    def worker(self) -> int:
        found: list[int] = []

        def there() -> bool:
            children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text()
            found[:] = map(int, children.split())
            return bool(found)

        until(there, "a worker")
        return found[-1]

    def kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait(10)

    def close(self) -> None:
        self.kill()
        # the worker holds the pipe too: its end is the reader's
        self._reader.join(20)
        assert self._process.stdout is not None
        self._process.stdout.close()


@contextmanager
def zygote(directory: Path) -> Iterator[Zygote]:
    made = Zygote(directory)
    try:
        yield made
    finally:
        made.close()
