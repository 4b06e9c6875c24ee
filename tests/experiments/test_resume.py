"""What has been measured is not measured again: neither after an end in the middle nor by the same command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from experiments import editing, questions, retention
from tests.experiments.pretended import Pretended


def told_apart(tenants: list[str]) -> tuple[set[str], list[str]]:
    """The names of the items' own memories, and of those that several items begin with one for each update."""
    names = [tenant.split("-", 2)[2] for tenant in tenants]
    shared = [name for name in names if name.startswith(("world", "base"))]
    return set(names) - set(shared), sorted(shared)


@pytest.mark.parametrize(
    ("main", "words"),
    [
        (retention.main, ["--items", "6", "--steps", "0", "2"]),
        (retention.main, ["--items", "6", "--steps", "1", "--warm", "3"]),
        (questions.main, ["--items", "2"]),
        (editing.main, ["--generated", "--cases", "12"]),
    ],
)
def test_a_run_goes_on_from_what_it_has_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, main: Callable[[], int], words: list[str]
) -> None:
    server = Pretended()

    def run(name: str, *more: str) -> object:
        told = server.run(monkeypatch, tmp_path / name, main, *words, "--concurrency", "2", *more)
        return {key: value for key, value in told.items() if key not in ("command", "date")}

    whole = run("whole")
    taken = len(server.updated)
    items, shared = told_apart(server.updated)
    server.updated, server.patience = [], taken * 2 // 3
    with pytest.raises(SystemExit, match="500; the same command goes on from here"):
        run("part")
    before, shared_before = told_apart(server.updated)
    server.updated, server.patience = [], taken
    assert run("part") == whole
    after, shared_after = told_apart(server.updated)
    # only the items that were cut off are begun anew
    assert before | after == items
    assert len(before & after) <= 2 < len(before)
    # and what was begun for several is neither told twice nor left out
    assert sorted(shared_before + shared_after) == shared
    # now nothing is left to do
    server.patience = 0
    assert run("part") == whole
    with pytest.raises(SystemExit, match="500"):
        run("part", "--fresh")
