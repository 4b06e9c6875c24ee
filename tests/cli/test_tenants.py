from __future__ import annotations

import json

import pytest

from tests.cli.conftest import Fake, Run

TENANT = {
    "id": "a/b ü",
    "seed": 7,
    "memory_version": 2,
    "created": 0.0,
    "updated": 0.0,
    "bytes": 12345,
    "tier": "cold",
    "lineage": 1,
}


def test_names_are_encoded_in_paths(fake: Fake, run: Run) -> None:
    path = "/tenants/a%2Fb%20%C3%BC"
    fake.answer(path, TENANT | {"limits": {"updates_per_day": 0, "bytes": 20_000, "concurrent": 2}})
    fake.answer("/tenants", TENANT, 201)
    shown = run("tenants", "show", "a/b ü").out
    assert "12,345" in shown
    assert "20,000 bytes, 2 concurrent" in shown
    assert run("tenants", "create", "a/b ü", "--seed", "7").code == 0
    assert run("tenants", "create", "a/b ü").code == 0
    assert run("tenants", "erase", "a/b ü", "--yes").code == 0
    assert fake.seen == [
        ("GET", path, None),
        ("POST", "/tenants", {"id": "a/b ü", "seed": 7}),
        ("POST", "/tenants", {"id": "a/b ü"}),
        ("DELETE", path, None),
    ]
    assert run("tenants", "show", "\udcff").code == 2


def test_a_page_of_names(fake: Fake, run: Run) -> None:
    fake.answer("/tenants", {"tenants": ["a", "[red]b"], "next": "[red]b", "total": 9})
    ran = run("tenants", "list", "--limit", "2", "--after", "A&a")
    assert ran.out == "a\n[red]b\n"
    assert "--after '[red]b'" in ran.err
    assert fake.seen[0][1] in ("/tenants?limit=2&after=A%26a", "/tenants?after=A%26a&limit=2")
    assert json.loads(run("tenants", "list", "--json").out)["total"] == 9
    assert run("tenants", "list", "--limit", "0").code == 2


def test_memory_is_averaged_over_layers(fake: Fake, run: Run) -> None:
    def layer(*shares: tuple[int, float]) -> dict[str, object]:
        return {"versions": [{"version": version, "share": share} for version, share in shares]}

    fake.answer(
        "/tenants/ada/memory",
        {"memory_version": 5, "layers": [layer((0, 0.5), (5, 0.5)), layer((0, 0.75), (4, 0.25))]},
    )
    rows = [" ".join(line.split()) for line in run("tenants", "memory", "ada").out.splitlines()]
    assert rows[1:] == [
        "5 0 25.0% (0.0% to 50.0% by layer)",
        "4 1 12.5% (0.0% to 25.0% by layer)",
        "0, the model's own 5 62.5% (50.0% to 75.0% by layer)",
    ]


def test_history_has_a_line_for_each_update(fake: Fake, run: Run) -> None:
    entry = {
        "memory_version": 1,
        "time": 0.0,
        "tokens": 20,
        "text": "two\nlines " + "x" * 99,
        "surviving_share": 0.5,
    }
    fake.answer("/tenants/ada/history", {"updates": [entry, entry | {"text": None}]})
    lines = run("tenants", "history", "ada", "--before", "4").out.splitlines()
    assert len(lines) == 3
    assert "two lines xxx" in lines[1]
    assert "…" in lines[1]
    assert "before=4" in fake.seen[0][1]


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_erasing_without_a_terminal_needs_yes(fake: Fake, run: Run, flags: list[str]) -> None:
    ran = run("tenants", "erase", "ada", *flags, stdin="y\n")
    assert (ran.code, ran.out, fake.seen) == (2, "", [])
    assert "--yes" in (json.loads(ran.err)["error"]["message"] if flags else ran.err)
