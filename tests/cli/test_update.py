from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import UPDATED, Fake, Run


def test_sends_the_text_and_tells_what_was_remembered(fake: Fake, run: Run) -> None:
    fake.events("/update", ("progress", {"done": 1, "total": 2, "memory_version": 2}), ("done", UPDATED))
    ran = run("update", "Rex is a dog.", "-t", "ada", "--idempotency-key", "k", "--short", "repeat")
    sent = {
        "tenant": "ada",
        "text": "Rex is a dog.",
        "short": "repeat",
        "idempotency_key": "k",
        "stream": True,
    }
    assert fake.seen == [("POST", "/update", sent)]
    # not a terminal: no progress
    assert (ran.code, ran.out, ran.err) == (
        0, "remembered 40 tokens in 2 blocks; 'ada' is at version 3\n", "",
    )  # fmt: skip


def test_says_when_nothing_was_done_and_when_a_text_was_repeated(fake: Fake, run: Run) -> None:
    fake.events("/update", ("done", UPDATED | {"replayed": True}))
    assert "done before" in run("update", "x").out
    fake.events("/update", ("done", UPDATED | {"short": "repeated"}))
    assert "text repeated" in run("update", "x").out


def test_json_is_the_servers_answer_and_nothing_else(fake: Fake, run: Run) -> None:
    fake.events("/update", ("progress", {"done": 1, "total": 2}), ("done", UPDATED))
    ran = run("update", "Rex.", "--json")
    assert (json.loads(ran.out), ran.err) == (UPDATED, "")


def test_texts_come_from_arguments_files_and_standard_input(fake: Fake, run: Run, tmp_path: Path) -> None:
    fake.events("/update", ("done", UPDATED))
    path = tmp_path / "text"
    path.write_text("\ufeffnaïve ☕", "utf-8")
    assert run("update", "--file", str(path)).code == 0
    assert run("update", "-", stdin="from a\npipe").code == 0
    assert [body["text"] for _, _, body in fake.seen] == ["naïve ☕", "from a\npipe"]


def test_what_is_no_text_is_never_sent(fake: Fake, run: Run, tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"\xff\xfe")
    for arguments in (
        ["--file", str(path)],
        ["--file", str(tmp_path / "none")],
        ["--file", str(tmp_path)],
        [],
        ["a", "--file", str(path)],
        ["a", "--short", "maybe"],
        # bytes that were no UTF-8, as Python hands them over
        ["\udcff"],
    ):
        ran = run("update", *arguments)
        assert (ran.code, ran.out) == (2, ""), arguments
        assert "Traceback" not in ran.err
    assert run("update", "-", stdin=b"\xff").code == 2
    assert fake.seen == []


def test_the_tenant_comes_from_the_flag_then_the_environment(fake: Fake, run: Run, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    fake.events("/update", ("done", UPDATED))
    run("update", "x")
    monkeypatch.setenv("MEMORYLLM_TENANT", "eva")
    run("update", "x")
    run("update", "x", "--tenant", "ada")
    assert [body["tenant"] for _, _, body in fake.seen] == ["default", "eva", "ada"]
