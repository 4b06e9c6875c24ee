"""Starts servers and workers by fork from a process that has imported torch already: a start takes a tenth of a second.

    python -m tests.faults.zygote SOCKET        until its standard input closes

What runs in the children is ``run_server`` and ``app.worker.process.main``; only their imports came before. A
request on the socket is a line of JSON with file descriptors: ``{"serve": settings}`` with the child's output, or
``{"work": endpoint, "for": the server's pid}`` with a worker's standard input and error. Births and deaths are told
on standard output. Whoever asks keeps the connection: it gets the exit code at the end, and closing it kills the child.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import socket
import sys
from pathlib import Path
from typing import NoReturn

LAUNCHER = Path(__file__).with_name("launcher.py")


class Zygote:
    def __init__(self, path: str) -> None:
        self.path = path
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen(64)
        self._children: dict[int, socket.socket] = {}
        # a child's death wakes the poll
        self._wake, bell = socket.socketpair()
        for end in (self._wake, bell):
            end.setblocking(False)
        self._bell = bell
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(bell.fileno(), warn_on_full_buffer=False)

    def run(self) -> None:
        """Returns when standard input is at its end; no child is left then."""
        say("ready")
        while True:
            watched = [0, self._listener, self._wake, *self._children.values()]
            ready, _, _ = select.select(watched, [], [], 1.0)
            if 0 in ready and not os.read(0, 4096):
                break
            if self._wake in ready:
                with contextlib.suppress(BlockingIOError):
                    self._wake.recv(4096)
            self._reap()
            for pid, asker in list(self._children.items()):
                # nobody says anything after the request: what can be read is the end
                if asker in ready:
                    self._kill(pid)
            if self._listener in ready:
                self._fork(self._listener.accept()[0])
        for pid in list(self._children):
            self._kill(pid)
            os.waitpid(pid, 0)

    def _kill(self, pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def _reap(self) -> None:
        while self._children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            code = os.waitstatus_to_exitcode(status)
            say(f"end {pid} {code}")
            asker = self._children.pop(pid)
            with contextlib.suppress(OSError):
                asker.send(f"{code}\n".encode())
            asker.close()

    def _fork(self, asker: socket.socket) -> None:
        asker.settimeout(5.0)
        data, descriptors, _, _ = socket.recv_fds(asker, 1 << 16, 4)
        try:
            request = json.loads(data)
        except ValueError:
            asker.close()
            return
        pid = os.fork()
        if pid == 0:
            self._child(request, asker, descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        self._children[pid] = asker
        say(f"{next(iter(request))} {pid} {request.get('for', 0)}")

    def _child(self, request: dict[str, object], asker: socket.socket, descriptors: list[int]) -> NoReturn:
        code = 70
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for end in (self._listener, self._wake, self._bell, asker, *self._children.values()):
                end.close()
            for number, target in zip(descriptors, (0, 2) if "work" in request else (1, 2), strict=False):
                os.dup2(number, target)
            if "serve" in request:
                os.dup2(1, 2)
                null = os.open(os.devnull, os.O_RDONLY)
                os.dup2(null, 0)
            for number in descriptors:
                os.close(number)
            os.setsid()
            code = serve(request["serve"], self.path) if "serve" in request else work(str(request["work"]))
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(code)


def say(line: str) -> None:
    os.write(1, line.encode() + b"\n")


def serve(settings: object, path: str) -> int:
    from app.api.server import run_server
    from app.settings import Settings

    command = (sys.executable, "-I", "-S", str(LAUNCHER), path)
    return run_server(Settings.model_validate(settings), command=command)


def work(endpoint: str) -> int:
    from app.worker.process import main

    sys.argv = ["app.worker", "--endpoint", endpoint]
    return main()


def preload() -> None:
    """All that the children would import; what starts threads of its own comes later, in them."""
    import redis  # noqa: F401
    import torch  # noqa: F401
    import uvloop  # noqa: F401

    import app.api.server
    import app.api.web
    import app.store.url
    import app.worker.process  # noqa: F401


if __name__ == "__main__":
    preload()
    # what is there now stays as it is in the children's memory
    gc.freeze()
    Zygote(sys.argv[1]).run()
