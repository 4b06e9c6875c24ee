"""Some cuts of Redis, of every kind; and that the proxy does as it is told."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.cuts import Cutting
from tests.faults.proxy import Proxy
from tests.faults.redis_mutants import MUTANTS, caught


@pytest.fixture
def echo() -> Iterator[int]:
    """A port that says everything twice."""
    listener = socket.create_server(("127.0.0.1", 0))

    def answer(end: socket.socket) -> None:
        with end:
            while data := end.recv(4096):
                end.sendall(data * 2)

    def serve() -> None:
        while True:
            try:
                end, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(end,), daemon=True).start()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield listener.getsockname()[1]
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(10)


def said(port: int, data: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as end:
        end.sendall(data)
        heard = b""
        try:
            while len(heard) < 2 * len(data):
                part = end.recv(4096)
                if not part:
                    break
                heard += part
        except ConnectionResetError:
            pass
        return heard


def test_a_proxy_cuts_at_the_byte(echo: int) -> None:
    proxy = Proxy(echo)
    assert said(proxy.port, b"hello") == b"hellohello"
    assert not proxy.fired
    proxy.arm("request", 0)
    assert said(proxy.port, b"hello") == b""
    assert proxy.fired
    proxy.arm("reply", 9)
    # what was sent before a reset may be lost with it, but nothing after the cut gets through
    assert b"hellohell".startswith(said(proxy.port, b"hello"))
    assert proxy.fired
    proxy.arm("reply", 3, stall=0.05)
    assert said(proxy.port, b"hello") == b"hellohello"
    assert proxy.fired
    proxy.arm("reply", 10)
    assert said(proxy.port, b"hello") == b"hellohello"
    assert not proxy.fired
    assert proxy.passed == {"request": 25, "reply": 40}
    proxy.close()


def test_cuts_lose_and_mix_nothing(tmp_path: Path) -> None:
    cutting = Cutting(tmp_path, seed=5, kills=0.1, stalls=0.05)
    try:
        cutting.run(30, lambda _: None)
    finally:
        cutting.close()
    assert cutting.found.cycles >= 30
    assert len(cutting.found.by) >= 3
    assert cutting.found.failed > 0


@pytest.mark.parametrize("name", MUTANTS)
def test_a_seeded_bug_is_caught(name: str, tmp_path: Path) -> None:
    assert caught(name, tmp_path)
