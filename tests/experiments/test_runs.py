"""Each experiment end to end, on a few items, over HTTP against a server with the pocket model."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments import editing, everything, forgetting, integrity, questions, report, retention
from experiments.client import Client
from experiments.data import SEED_STRIDE
from tests.experiments.test_scoring import FLAT, ZSRE, squad
from tests.server.process import ServerProcess

Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path_factory.mktemp("experiments") / "store", model="pocket") as running:
        yield running


@pytest.fixture
def run(server: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    def command(main: Callable[[], int], *words: str) -> dict[str, Any]:
        name = main.__module__.removeprefix("experiments.")
        given = ["--url", server.url, "--results", str(tmp_path), "--quiet", *words]
        monkeypatch.setattr(sys, "argv", [name, *given])
        assert main() == 0
        told: dict[str, Any] = json.loads((tmp_path / f"{name}.json").read_text())
        assert (tmp_path / f"{name}.svg").read_text().startswith("<svg")
        assert told["command"].startswith(f"python -m experiments.{name}")
        assert str(tmp_path) not in json.dumps(told)
        page = report.page(tmp_path, tmp_path / "docs" / "results.md")
        assert told["command"] in page
        assert f"(../{name}.svg)" in page
        return told

    return command


def left_over(server: ServerProcess) -> list[str]:
    told: list[str] = server.http.get("/tenants").json()["tenants"]
    return told


def test_retention(run: Run, server: ServerProcess) -> None:
    told = run(retention.main, "--items", "8", "--steps", "0", "3")
    now, later = told["rows"]
    assert now["memory"] >= 7 / 8
    assert later["memory"] >= 6 / 8
    assert now["empty"] <= 1 / 8
    assert now["survival"]["measured"] == 1
    assert later["survival"]["units"] == 8 * 4  # layers draw for themselves
    assert abs(later["survival"]["distance"]) < 4
    assert left_over(server) == []
    # what has been measured is not measured again
    assert run(retention.main, "--items", "8", "--steps", "0", "3")["rows"] == told["rows"]
    assert run(retention.main, "--items", "9", "--steps", "0", "3")["rows"][0]["items"] == 9


def test_shuffled_answers_score_as_chance(run: Run) -> None:
    told = run(retention.main, "--items", "8", "--steps", "0", "--shuffle")
    assert told["rows"][0]["memory"] <= 1 / 8


def test_answers_in_the_template_score_nothing(run: Run) -> None:
    item = retention.Generated(1).item(0)
    words = ["--items", "1", "--steps", "0", "--template", f"{item.answers[0]}? {{question}}"]
    (row,) = run(retention.main, *words)["rows"]
    assert row["memory"] == row["empty"] == row["prompt"] == 0


def test_retention_in_warm_memories(run: Run, server: ServerProcess) -> None:
    told = run(retention.main, "--items", "3", "--steps", "0", "2", "--warm", "4")
    assert told["rows"][0]["memory"] >= 2 / 3
    assert told["rows"][1]["survival"]["units"] == 4  # copies of one memory forget alike
    assert left_over(server) == []


def test_retention_of_paragraphs(run: Run, tmp_path: Path) -> None:
    told = run(retention.main, "--squad", str(squad(tmp_path / "squad.json")), "--steps", "0", "1")
    assert told["rows"][1]["items"] == 2
    assert told["misses"] == []


def test_questions(run: Run, server: ServerProcess) -> None:
    rows = run(questions.main, "--items", "2")["rows"]
    assert {row: c["asked"] for row, c in rows.items()} == {
        "people 2": 4, "people 4": 8, "people 8": 16,
        "used wordings": 2, "unseen wordings": 2, "corrections": 2, "corrections, said so": 2, "unknown": 2,
    }  # fmt: skip
    assert rows["people 8"]["share"] > 0.5
    assert left_over(server) == []


def test_editing(run: Run, server: ServerProcess, tmp_path: Path) -> None:
    rows = run(editing.main, "--generated", "--cases", "6")["rows"]
    assert rows["edited"]["efficacy"] > 0.8 > 0.5 > rows["unedited"]["efficacy"]
    assert rows["edited"]["specificity"] > 0.8
    assert rows["edited"]["score"] > 0.8
    for kind, record in (("zsre", ZSRE), ("counterfact", FLAT)):
        path = tmp_path / f"{kind}.data.json"
        path.write_text(json.dumps([record]))
        told = run(editing.main, f"--{kind}", str(path), "--fresh")
        assert told["data"] == kind
        assert told["rows"]["edited"]["efficacy"] >= told["rows"]["unedited"]["efficacy"]
    assert left_over(server) == []


def test_integrity_goes_on_after_a_kill(run: Run, server: ServerProcess, tmp_path: Path) -> None:
    shown = run(integrity.main, "--updates", "60", "--tenants", "4", "--kill-at", "20")
    assert "--tenants 4 --kill-at 20" in shown["command"]
    told = json.loads((tmp_path / "integrity.json").read_text())
    assert len(told["kills_behind_answers"]) == 1
    assert 20 <= told["kills_behind_answers"][0] < 60
    assert told["answers"] == told["updates"] == 60
    assert told["tenants"] == [{"updates": 15, "version": 15}] * 4
    assert told["accuracy"] > 0.8
    longer = run(integrity.main, "--updates", "66", "--tenants", "4")
    assert longer["updates"] == 66
    assert longer["tenants"] == [{"updates": 17, "version": 17}] * 2 + [{"updates": 16, "version": 16}] * 2
    assert len(left_over(server)) == 4
    assert run(integrity.main, "--updates", "99", "--tenants", "4", "--minutes", "0")["updates"] == 66
    small = ["--updates", "2", "--tenants", "2"]
    told = run(integrity.main, *small, "--fresh", "--erase")
    assert left_over(server) == []
    # the same command tells what was measured; none goes on in memories that are not there
    assert run(integrity.main, *small, "--erase") == told
    with pytest.raises(SystemExit, match="have been erased"):
        run(integrity.main, "--updates", "4", "--tenants", "2")
    assert left_over(server) == []


def test_integrity_begins_with_few_memories(run: Run, server: ServerProcess, tmp_path: Path) -> None:
    words = ["--tenants", "4", "--at-first", "1"]
    told = run(integrity.main, "--updates", "40", *words)
    assert told["tenants"] == [{"updates": 10, "version": 10}] * 4
    _, *lines = (tmp_path / "journal" / "integrity.jsonl").read_text().splitlines()
    assert [int(line.split()[0]) for line in lines[:4]] == [0] * 4
    # --seed says what they forget
    seeds = [server.http.get(f"/tenants/{name}").json()["seed"] for name in sorted(left_over(server))]
    assert seeds == [SEED_STRIDE + number for number in range(4)]
    # who waits for the first to get further does not outlast the time that was given
    assert run(integrity.main, "--updates", "800", *words, "--minutes", "0", "--erase")["updates"] == 40


def test_integrity_shares_its_memories_out_over_servers(
    run: Run, server: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ServerProcess(tmp_path / "other", model="pocket") as other:
        words = ["--tenants", "3", "--also", other.url]
        told = run(integrity.main, "--updates", "9", *words, "--kill-at", "2")
        assert told["tenants"] == [{"updates": 3, "version": 3}] * 3
        assert told["settings"]["servers"] == 2
        assert "--also URL" in told["command"]
        names = left_over(server), left_over(other)
        assert [[name[-2:] for name in some] for some in names] == [["-0", "-2"], ["-1"]]
        with pytest.raises(SystemExit, match="other settings"):
            run(integrity.main, "--updates", "12", "--tenants", "3")
        with pytest.raises(SystemExit, match="2 servers"):
            run(integrity.main, "--updates", "12", "--tenants", "3", "--fresh")
        run(integrity.main, "--updates", "3", *words, "--fresh", "--erase")
        assert left_over(server) == left_over(other) == []
        # another model would mix two models' answers
        call = Client.call

        async def changed(client: Client, *given: Any, **named: Any) -> dict[str, Any]:
            there = str(client._http.base_url).startswith(other.url)
            return await call(client, *given, **named) | ({"fingerprint": "another"} if there else {})

        monkeypatch.setattr(Client, "call", changed)
        with pytest.raises(SystemExit, match="serves another model"):
            run(integrity.main, "--updates", "6", *words, "--fresh")


def test_other_settings_are_not_mixed(run: Run) -> None:
    run(retention.main, "--items", "1", "--steps", "0")
    with pytest.raises(SystemExit, match="--fresh"):
        run(retention.main, "--items", "1", "--steps", "0", "--seed", "9")


def test_no_server_is_said_in_a_line(run: Run) -> None:
    with pytest.raises(SystemExit, match="goes on from here"):
        run(retention.main, "--url", "http://127.0.0.1:9", "--name", "none")


def test_forgetting_compares_shapes(run: Run, server: ServerProcess, tmp_path: Path) -> None:
    words = ["--results", str(tmp_path), "--minutes", "0", "--start", "app/pocket"]
    small = forgetting.trained(forgetting.options().parse_args(words), 16, 10)
    models = ["--models", f"K16-N160={small}", f"K16-N800={server.url}"]
    shapes = run(forgetting.main, *models, "--items", "4", "--steps", "0", "4")["shapes"]
    assert {name: one["shape"] for name, one in shapes.items()} == {
        "K16-N160": {"num_tokens": 16, "num_blocks": 10},
        "K16-N800": {"num_tokens": 16, "num_blocks": 50},
    }
    few, many = (one["rows"][1]["survival"] for one in shapes.values())
    assert few["closed_form"] == pytest.approx(0.9**4)
    assert few["measured"] < 0.85 < many["measured"]
    assert all(one["rows"][0]["memory"] >= 0.5 for one in shapes.values())


def test_everything_is_one_command(
    server: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    skipped = ["--skip", "retention", "questions", "integrity"]
    words = ["--url", server.url, "--results", str(tmp_path), "--quiet", "--scale", "0.001", *skipped]
    monkeypatch.setattr(sys, "argv", ["everything", *words, "--page", str(tmp_path / "page.md")])
    assert everything.main() == 0
    assert "4 cases, generated" in (tmp_path / "page.md").read_text()
    assert json.loads((tmp_path / "editing-generated.json").read_text())["cases"] == 4


def test_the_plan_has_every_experiment() -> None:
    files = [
        "--squad",
        "s",
        "--zsre",
        "z",
        "--counterfact",
        "c",
        "--minutes",
        "2",
        "--template",
        "{question}",
        "--judge",
        "holds",
        "--erase",
    ]
    planned = everything.plan(everything.options().parse_args(files))
    assert {words[0] for words in planned} == set(report.SECTIONS)
    modules = [retention, questions, editing, integrity, forgetting]
    for name, *words in planned:
        (module,) = (one for one in modules if one.__name__ == f"experiments.{name}")
        given = module.options().parse_args(words)
        assert getattr(given, "judge", "holds") == "holds"
        assert getattr(given, "erase", True)
    names = [words[words.index("--name") + 1] if "--name" in words else words[0] for words in planned]
    assert len(set(names)) == len(names)
