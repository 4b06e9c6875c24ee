"""A few seconds of people against a real server: what both sides counted agrees, and a report comes of it."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
from pathlib import Path

import pytest

from loadtest import __main__ as main
from loadtest import report
from loadtest.bare import Bare
from loadtest.measures import names
from loadtest.overload import overload
from loadtest.people import Crowd, Habits
from loadtest.run import MODEL, Result, Run, Scenario, closing_rows, run

SECONDS = 2.0
# how fast this machine is does not matter here, only that nothing is lost or counted twice
COUNTED = {
    "/generate answered with 200",
    "/generate refused or failed",
    "/update answered with 200",
    "/update refused or failed",
    "generated tokens",
    "blocks of updates",
}


async def people(run: Run) -> None:
    habits = Habits(think=0.1, tokens=(4, 12), streaming=0.7, hanging_up=0.4)
    crowd = Crowd(names("p", 12), run.rng, habits, group="people")
    impatient = Crowd(["flood"], run.rng, Habits(1, 0, (24, 24), 0, 1, 1, 0), group="flood")
    await run.open("people", SECONDS, (crowd, 4.0))
    await run.open("flood", 0.2, (impatient, 200.0))
    run.row("`sessions`", "1", "", str(len(run.client.answers)), True)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    with Bare(sizes=MODEL) as bare:
        sizes = bare.sizes
    return asyncio.run(
        run(
            "people",
            Scenario(people, slots=8, options={"queue_requests_tenant": 8, "max_running": 8}),
            sizes,
            scale=1.0,
            minutes=1.0,
            seed=5,
            log=tmp_path_factory.mktemp("load") / "log",
            progress=lambda _: None,
        )
    )


def test_the_load_was_what_it_should_be(result: Result) -> None:
    kinds = {(a.kind, a.group) for a in result.answers}
    assert kinds == {("generate", "people"), ("update", "people"), ("generate", "flood")}
    assert any(a.hung_up for a in result.answers)
    assert any(a.streamed for a in result.answers)
    assert any(not a.streamed and a.good for a in result.answers)
    refused = [a for a in result.answers if a.status == 429]
    assert refused
    assert {(a.group, a.code) for a in refused} == {("flood", "tenant_queue_full")}
    assert not result.unplanned
    # with ignore_eos everybody gets what was asked for
    assert all(a.tokens == a.asked for a in result.answers if a.kind == "generate" and a.good)


def test_both_sides_count_alike(result: Result) -> None:
    compared = {a.what: a for a in result.agreements}
    assert compared.keys() >= COUNTED
    for what in COUNTED - {"generated tokens"}:
        assert compared[what].client == compared[what].server, what
    assert compared["generated tokens"].client > 100
    # those who hang up leave tokens behind that only the server has counted
    left = sum(a.asked - a.tokens for a in result.answers if a.hung_up)
    tokens = compared["generated tokens"]
    assert tokens.client <= tokens.server <= tokens.client + left
    assert compared["/generate refused or failed"].client > 0
    assert compared["blocks of updates"].client > 0
    assert {what for what in compared if what.startswith("mean")} <= compared.keys()


def test_the_report_needs_nothing_else(result: Result, tmp_path: Path) -> None:
    report.write(tmp_path, [result], 1.0)
    page = (tmp_path / "report.html").read_text()
    for title in ("Time to first token", "Time per token", "Goodput", "Queueing", "Residency", "Fairness"):
        assert re.search(rf"<text [^>]*>{title}", page), title
    assert not re.search(r"<(script|link|img|iframe)|@import|url\(", page)
    assert set(re.findall(r"https?://[^\s'\"<]+", page)) == {"http://www.w3.org/2000/svg"}
    figures = json.loads((tmp_path / "figures.json").read_text(), parse_constant=pytest.fail)
    assert figures["rows"][0]["what"] == "`sessions`"
    assert "<td><code>sessions</code></td>" in page
    told = figures["scenarios"]["people"]
    assert told["groups"]["people generate"]["requests"] > 0
    assert told["client_lag"]["loop p99"] >= 0
    assert 0 < told["fairness"] <= 1


def test_a_disagreement_falls_short(result: Result) -> None:
    good = dataclasses.replace(result, agreements=[a for a in result.agreements if a.what in COUNTED])
    first = good.agreements[0]
    off = dataclasses.replace(first, server=first.client * 1.2)
    agree, disagree = (
        closing_rows([dataclasses.replace(good, agreements=a)])[0] for a in ([first], [first, off])
    )
    assert agree.good
    assert not disagree.good
    assert "1 of 2" in disagree.reached
    assert "20.0 %" in disagree.reached


def test_what_nobody_planned_falls_short(result: Result) -> None:
    answer = dataclasses.replace(next(a for a in result.answers if a.good))
    for change in (
        {"status": 500, "code": "internal_error"},
        {"status": 0, "code": "timeout"},
        {"cut": True},
        {"code": "x"},
    ):
        bad = dataclasses.replace(result, answers=[dataclasses.replace(answer, **change)])
        assert not closing_rows([bad])[-1].good, change
    meant = dataclasses.replace(answer, status=503, code="server_overloaded")
    for planned, good in ((frozenset({"server_overloaded"}), True), (frozenset({"other"}), False)):
        assert closing_rows([dataclasses.replace(result, answers=[meant], planned=planned)])[-1].good is good


def test_one_scenario_s_fault_loses_neither_its_own_results_nor_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def breaking(run: Run) -> None:
        await run.open("people", 0.3, (Crowd(["ann"], run.rng, Habits(1, 0, (4, 4)), group="people"), 10.0))
        run.row("what came before", "1", "", "1", True)
        raise ValueError("a fault")

    async def whole(run: Run) -> None:
        run.row("what came after", "1", "", "1", True)

    scenarios = {
        "none": Scenario(whole, options={"no_such_option": 1}),
        "breaking": Scenario(breaking, slots=8),
        "whole": Scenario(whole, slots=8),
    }
    monkeypatch.setattr(main, "SCENARIOS", scenarios)
    assert main.main(["--scale", "0.1", "--out", str(tmp_path)]) == 1
    figures = json.loads((tmp_path / "figures.json").read_text())
    rows = {row["what"]: row for row in figures["rows"]}
    assert rows["what came before"]["good"]
    assert rows["what came after"]["good"]
    assert figures["scenarios"]["breaking"]["groups"]["people generate"]["requests"] > 0
    assert figures["scenarios"]["whole"]["seconds"] > 0
    for name, words in (("breaking", "ValueError: a fault"), ("none", "did not start")):
        row = rows[f"`{name}` is played to its end"]
        assert not row["good"]
        assert words in row["reached"]


def test_a_server_that_does_not_start_is_said(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="did not start"):
        asyncio.run(
            run(
                "none",
                Scenario(overload, options={"no_such_option": 1}),
                {"pool": 1, "copy": 1},
                scale=1.0,
                minutes=1.0,
                seed=1,
                log=tmp_path / "log",
                progress=lambda _: None,
            )
        )
    assert "such" in (tmp_path / "log").read_text()
