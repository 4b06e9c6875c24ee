"""What has been measured is not measured again: neither after an end in the middle nor by the same command."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments import editing, questions, retention
from experiments.cases import KNOWN
from tests.experiments.pretended import Pretended


def told_apart(tenants: list[str]) -> tuple[set[str], Counter[str]]:
    """The names of the items' own memories; and of those that several items begin with, how often each is told."""
    names = [tenant.split("-", 2)[2] for tenant in tenants]
    shared = Counter(name for name in names if name.startswith(("world", "base")))
    return set(names) - set(shared), shared


@pytest.mark.parametrize(
    ("main", "words", "before"),
    [
        (retention.main, ["--items", "6", "--steps", "0", "2"], {}),
        (retention.main, ["--items", "6", "--steps", "1", "--warm", "3"], {"base-0": 3}),
        (questions.main, ["--items", "2"], {}),
        (editing.main, ["--generated", "--cases", "12"], {"world-0": KNOWN, "world-1": KNOWN}),
    ],
)
def test_a_run_goes_on_from_what_it_has_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, main: Callable[[], int], words: list[str],
    before: dict[str, int],
) -> None:  # fmt: skip
    """``before`` are the memories that items begin with, and how many updates they have taken."""
    server = Pretended()

    def run(name: str, *more: str) -> object:
        told = server.run(monkeypatch, tmp_path / name, main, *words, "--concurrency", "2", *more)
        return {key: value for key, value in told.items() if key not in ("command", "date")}

    whole = run("whole")
    taken = len(server.updated)
    items, shared = told_apart(server.updated)
    assert shared == before
    server.updated, server.patience = [], taken * 3 // 4
    with pytest.raises(SystemExit, match="500; the same command goes on from here"):
        run("part")
    first, shared = told_apart(server.updated)
    server.updated, server.patience = [], taken
    assert run("part") == whole
    second, more = told_apart(server.updated)
    # only the items that were cut off are begun anew
    assert first | second == items
    assert len(first & second) <= 2 < len(first)
    # and what they begin with is neither told twice nor left out
    assert shared + more == before
    # now nothing is left to do
    server.patience = 0
    assert run("part") == whole
    with pytest.raises(SystemExit, match="500"):
        run("part", "--fresh")
