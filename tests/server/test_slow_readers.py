"""Readers of a real server who do not read: the worker goes on for others, and what is kept for them is bounded."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path
from typing import Any

from tests.server.process import ServerProcess, until

PROMPT = [5, 6, 7, 8, 9]
# so long a generation has not ended by itself when its reader is given up, however little the API gets to do
SLOW: dict[str, Any] = {"worker_nice": 0, "max_sequence": 65_536}
CANCELLED = 'memoryllm_request_success_total{finished_reason="cancelled"} 1.0'


def asks_and_does_not_read(server: ServerProcess) -> socket.socket:
    """A stream of large events, over segments as small as a network's: the loopback's buffers would hold all of it."""
    body = json.dumps(
        {"tenant": "slow", "prompt": PROMPT, "max_tokens": 60_000, "stream": True, "ignore_eos": True,
         "return_token_ids": True, "logprobs": 20}
    ).encode()  # fmt: skip
    reader = socket.socket()
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    reader.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
    reader.settimeout(60)
    host, port = server.url.removeprefix("http://").split(":")
    reader.connect((host, int(port)))
    lines = [
        "POST /generate HTTP/1.1",
        "host: localhost",
        "content-type: application/json",
        f"content-length: {len(body)}",
    ]
    reader.sendall("\r\n".join([*lines, "", ""]).encode() + body)
    return reader


def tokens_in(told: bytes) -> int:
    """Tokens, not events: those that come while the server is busy with something else share one."""
    return sum(len(json.loads(ids)) for ids in re.findall(rb'"token_ids":(\[[^]]*])', told))


def all_of(reader: socket.socket) -> bytes:
    told = b""
    try:
        while piece := reader.recv(65536):
            told += piece
            if told.endswith(b"0\r\n\r\n"):
                break
    except ConnectionResetError:
        pass
    return told


def test_one_who_reads_nothing_is_disconnected(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "store", stream_stall_timeout=1, **SLOW) as server:
        with asks_and_does_not_read(server) as reader:
            assert len(server.tokens("other", PROMPT, 8)) == 8
            until(
                lambda: any("stream cut off" in line for line in server.lines), "the end of the slow reader"
            )
            until(lambda: CANCELLED in server.http.get("/metrics").text, "the end of the generation")
            told = all_of(reader)
        assert b"event: error" not in told
        assert b"[DONE]" not in told
        assert len(server.tokens("other", PROMPT, 8)) == 8


def test_one_who_is_too_far_behind_gets_what_was_kept_and_is_told_why_it_ends(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "store", stream_backlog=32, **SLOW) as server:
        with asks_and_does_not_read(server) as reader:
            until(lambda: CANCELLED in server.http.get("/metrics").text, "the end of the generation")
            told = all_of(reader)
        assert tokens_in(told) >= 32
        assert b'"code":"client_too_slow"' in told[-600:]
