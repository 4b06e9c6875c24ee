"""What recall tells a server it takes back, whatever ends it."""

from __future__ import annotations

import asyncio
import json
import sys

import httpx
import pytest

from experiments import recall
from experiments.transport import PlainAnswer


def test_no_memory_is_left_where_one_fact_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    there: set[str] = set()
    updates: list[str] = []
    erased: set[str] = set()

    async def ask(_: recall.Client, method: str, path: str, body: dict[str, str] | None) -> PlainAnswer:
        await asyncio.sleep(0)  # so that facts take turns
        tenant = body["tenant"] if body else path.rpartition("/")[2]
        if path == "/update":
            updates.append(tenant)
            if len(updates) == 3:
                return PlainAnswer(500, [], b"broken")
            there.add(tenant)
        if method == "DELETE":
            there.discard(tenant)
            erased.add(tenant)
        return PlainAnswer(200, [], json.dumps({"text": ""}).encode())

    monkeypatch.setattr(recall.Client, "_ask", ask)
    words = [
        "recall",
        "--url",
        "http://127.0.0.1:9",
        "--facts",
        "6",
        "--concurrency",
        "3",
        "--later",
        "0",
        "2",
    ]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit, match="broken"):
        recall.main()
    assert len(set(updates)) == 3
    assert set(updates) <= erased
    assert there == set()


def test_no_server_is_said_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask(*_: object) -> PlainAnswer:
        raise httpx.ConnectError("refused")

    monkeypatch.setattr(recall.Client, "_ask", ask)
    monkeypatch.setattr("experiments.client.UNREACHED", 0.0)
    monkeypatch.setattr(sys, "argv", ["recall"])
    with pytest.raises(SystemExit, match="refused"):
        recall.main()
