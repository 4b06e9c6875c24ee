"""The figures of the breaking bench in the smallest sizes: what they are is for ``make torture`` to say."""

from __future__ import annotations

from pathlib import Path

from loadtest.rows import Row, table
from tests.faults import figures
from tests.faults.report import read, write


def test_a_tenant_keeps_within_its_bytes(tmp_path: Path) -> None:
    found = figures.bytes_in_pools(tmp_path, 53)
    assert 1.0 < found["after"] <= found["most"] < 1.3


def test_times_are_taken_of_what_they_say(tmp_path: Path) -> None:
    found = figures.updating(tmp_path, "pocket", times=3)
    assert all(found[kind] > 0 for kind in ("durable", "memory", "syncs"))
    assert found["bytes"] > 4 * 16 * 192 * 4


def test_the_table_is_kept_and_says_what_falls_short(tmp_path: Path) -> None:
    rows = [
        Row("kills", "500", "10,000", "501", True, {"cycles": 501}),
        Row("load", "60 %", "", "5 %", False),
    ]
    write(tmp_path / "deep" / "t.json", {"a": rows[:1], "b": rows[1:]})
    assert read(tmp_path / "deep" / "t.json") == {"a": rows[:1], "b": rows[1:]}
    assert read(tmp_path / "none.json") == {}
    assert table(rows).splitlines()[2:] == [
        "| kills | 500 | 10,000 | 501 |  |",
        "| load | 60 % |  | 5 % | NO |",
    ]
