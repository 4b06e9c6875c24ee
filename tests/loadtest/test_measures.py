"""What counts as useful, whose answers a phase has, and what counts as lost."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from typing import cast

import pytest

from loadtest.client import Answer, Client
from loadtest.drain import _missing
from loadtest.measures import USEFUL_SECONDS, first_tokens, goodput, within
from loadtest.run import Phase

PHASE = Phase("p", 100.0, 110.0)
GOOD = Answer(
    "generate", "t", "g", due=103.0, sent=103.5, first=104.0, last=105.0, end=105.0, status=200, tokens=40
)


def test_only_useful_answers_are_goodput() -> None:
    worthless = [
        dataclasses.replace(GOOD, first=GOOD.due + USEFUL_SECONDS + 0.1),
        dataclasses.replace(GOOD, status=503),
        dataclasses.replace(GOOD, code="worker_unavailable"),
        dataclasses.replace(GOOD, cut=True),
        dataclasses.replace(GOOD, hung_up=True),
        dataclasses.replace(GOOD, end=101.9),
        dataclasses.replace(GOOD, end=110.1),
    ]
    assert goodput([GOOD, *worthless], PHASE, 2.0) == pytest.approx(40 / 8)


def test_waiting_counts_from_when_it_was_due() -> None:
    assert first_tokens([GOOD, dataclasses.replace(GOOD, status=429)]) == [1.0]


def test_a_phase_has_what_was_due_in_it() -> None:
    others = [
        dataclasses.replace(GOOD, due=99.9),
        dataclasses.replace(GOOD, due=110.1),
        dataclasses.replace(GOOD, group="other"),
        dataclasses.replace(GOOD, kind="update"),
    ]
    late = dataclasses.replace(GOOD, sent=120.0)
    assert within([GOOD, *others, late], PHASE, "g") == [GOOD, late]


class Tenants:
    """A server that knows versions."""

    def __init__(self, versions: dict[str, int]) -> None:
        self.versions = versions

    async def get(self, path: str) -> tuple[int, bytes]:
        version = self.versions.get(path.removeprefix("/tenants/"))
        return (404, b"{}") if version is None else (200, json.dumps({"memory_version": version}).encode())


def test_acknowledged_updates_that_are_not_there() -> None:
    def missing(**there: int) -> int:
        return asyncio.run(_missing(cast("Client", Tenants(there)), {"a": 3, "b": 2}))

    assert missing(a=3, b=2) == 0
    assert missing(a=4, b=9) == 0
    assert missing(a=1, b=2) == 2
    assert missing(b=2) == 3
