"""A TCP proxy on the loopback that breaks a connection at a given byte, or holds it up there."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal

Direction = Literal["request", "reply"]


class Proxy:
    """Forwards to ``port``. Nothing happens until ``arm``; after a cut new connections work as before."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._guard = threading.Lock()
        self._armed: tuple[Direction, int, float] | None = None
        self._stalled = 0
        self.passed: dict[Direction, int] = {"request": 0, "reply": 0}
        self.fired = False
        self._sockets: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def arm(self, direction: Direction, after: int, stall: float = 0.0) -> None:
        """Breaks the connection that carries the byte ``after`` from now on in ``direction``, before that byte.

        With ``stall`` the byte and what follows come so many seconds later instead.
        """
        with self._guard:
            self._armed, self.fired = (direction, after, stall), False

    def disarm(self) -> None:
        with self._guard:
            self._armed, self.fired = None, False

    def settle(self, seconds: float = 10.0) -> None:
        """Waits until all that was held up has gone on its way."""
        end = time.monotonic() + seconds
        while self._stalled and time.monotonic() < end:
            time.sleep(0.005)

    def close(self) -> None:
        self._listener.close()
        with self._guard:
            sockets = list(self._sockets)
        for each in sockets:
            self._break(each)

    # ------------------------------------------------------------ threads

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self._target), timeout=5)
            except OSError:
                self._break(client)
                continue
            for each in (client, server):
                each.settimeout(None)
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._guard:
                self._sockets |= {client, server}
            for source, sink, direction in ((client, server, "request"), (server, client, "reply")):
                threading.Thread(target=self._pump, args=(source, sink, direction), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, direction: Direction) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                before, stall = self._passing(direction, len(data))
                if stall is None:
                    sink.sendall(data)
                    continue
                sink.sendall(data[:before])
                if not stall:
                    break
                with self._held():
                    time.sleep(stall)
                    sink.sendall(data[before:])
        self._break(source)
        self._break(sink)

    def _passing(self, direction: Direction, size: int) -> tuple[int, float | None]:
        """How many bytes may pass at once, and how long the others wait: 0 for ever, None not at all."""
        with self._guard:
            self.passed[direction] += size
            if self._armed is None or self._armed[0] != direction:
                return size, None
            _, after, stall = self._armed
            if after >= size:
                self._armed = (direction, after - size, stall)
                return size, None
            self._armed, self.fired = None, True
            return after, stall

    @contextmanager
    def _held(self) -> Iterator[None]:
        """While bytes wait."""
        with self._guard:
            self._stalled += 1
        try:
            yield
        finally:
            with self._guard:
                self._stalled -= 1

    def _break(self, end: socket.socket) -> None:
        with self._guard:
            if end not in self._sockets and end.fileno() < 0:
                return
            self._sockets.discard(end)
        with suppress(OSError):
            # a reset, not a polite end
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            end.shutdown(socket.SHUT_RDWR)
        end.close()
