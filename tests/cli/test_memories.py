"""``memoryllm tenants`` on memories as things."""

from __future__ import annotations

import json

import pytest

from tests.cli.conftest import Fake, Run
from tests.cli.test_tenants import TENANT


def test_fork(fake: Fake, run: Run) -> None:
    fake.answer("/tenants/a%2Fb/fork", TENANT, 201)
    assert "12,345" in run("tenants", "fork", "a/b", "new ü", "--version", "3").out
    assert json.loads(run("tenants", "fork", "a/b", "new", "--json").out) == TENANT
    assert fake.seen == [
        ("POST", "/tenants/a%2Fb/fork", {"target": "new ü", "version": 3}),
        ("POST", "/tenants/a%2Fb/fork", {"target": "new"}),
    ]
    assert run("tenants", "fork", "a/b", "new", "--version", "-1").code == 2


def test_rollback(fake: Fake, run: Run) -> None:
    fake.answer("/tenants/ada/rollback", TENANT)
    assert "lineage" in run("tenants", "rollback", "ada", "2", "--yes").out
    assert fake.seen == [("POST", "/tenants/ada/rollback", {"version": 2})]
    error = {"error": {"message": "not kept", "type": "not_found_error", "code": "version_not_kept"}}
    fake.answer("/tenants/ada/rollback", error, 404)
    assert run("tenants", "rollback", "ada", "9", "-y").code == 3


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_rolling_back_without_a_terminal_needs_yes(fake: Fake, run: Run, flags: list[str]) -> None:
    ran = run("tenants", "rollback", "ada", "2", *flags, stdin="y\n")
    assert (ran.code, ran.out, fake.seen) == (2, "", [])
    assert "--yes" in (json.loads(ran.err)["error"]["message"] if flags else ran.err)


def test_rebuild(fake: Fake, run: Run) -> None:
    done = TENANT | {"rebuilt": True, "blocks": 2, "tokens": 40}
    progress = {"done": 1, "total": 2, "memory_version": 1}
    fake.events("/tenants/ada/rebuild", ("progress", progress), ("done", done))
    assert "12,345" in run("tenants", "rebuild", "ada").out
    assert json.loads(run("tenants", "rebuild", "ada", "--force", "--json").out) == done
    assert [body for _, _, body in fake.seen] == [{"stream": True}, {"force": True, "stream": True}]
    error = {"error": {"message": "not kept", "type": "conflict_error", "code": "texts_not_kept"}}
    fake.answer("/tenants/ada/rebuild", error, 409)
    assert run("tenants", "rebuild", "ada").code == 3
    fake.events("/tenants/ada/rebuild", ("progress", progress), ("error", error))
    assert run("tenants", "rebuild", "ada").code == 3


def test_a_receipt_is_readable(fake: Fake, run: Run) -> None:
    receipt = {"id": "ada", "erased": True, "bytes": 12345, "tiers": ["resident", "warm"], "files": 0}
    fake.answer("/tenants/ada", receipt)
    lines = run("tenants", "erase", "ada", "--yes").out.splitlines()
    assert "tiers           resident, warm" in lines
    fake.answer("/tenants/ada", receipt | {"tiers": []})
    assert "tiers           none" in run("tenants", "erase", "ada", "--yes").out.splitlines()
