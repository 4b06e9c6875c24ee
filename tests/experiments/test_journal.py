"""A log is of one run at a time and of one kind of settings, and outlives a kill; what a run starts ends with it."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from experiments import integrity, interrupted, report, session
from experiments.journal import AnotherRun, Journal, Log, OtherSettings, differing
from experiments.session import Session, measured

# the head of a log that was written before settings told of devices, files and rules
OLD: dict[str, Any] = {
    "seed": 1, "tenants": 80, "at_first": 8, "ask_every": 1, "template": None, "max_tokens": 16, "servers": 2,
    "model": "pocket", "fingerprint": "767f",
}  # fmt: skip


def test_a_journal_goes_on_behind_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "journal" / "a.jsonl"
    log = Log(path, {"seed": 1}, "first")
    Journal(log).add("0", [True])
    log.close()
    path.write_bytes(path.read_bytes() + b'{"item": "1", "meas')
    again = Log(path, {"seed": 1}, "second")
    assert again.run == "first"
    journal = Journal(again)
    assert journal.items == {"0": [True]}
    journal.add("1", [False])
    again.close()
    assert path.read_text().count("\n") == 3
    for _ in range(2):  # what is refused is not held
        with pytest.raises(OtherSettings, match="seed"):
            Log(path, {"seed": 2}, "third")


def test_a_log_has_one_run_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    log = Log(path, {"seed": 1}, "first")
    log.write(b"0 1 1")
    kept = path.read_bytes()
    with pytest.raises(AnotherRun, match="another run"):
        Log(path, {"seed": 1}, "second")
    with pytest.raises(AnotherRun):
        asyncio.run(session.forget([], "integrity", path))
    with pytest.raises(SystemExit, match="another run"):
        interrupted.alone(path)
    assert path.read_bytes() == kept
    log.close()
    asyncio.run(session.forget([], "integrity", path))
    anew = Log(path, {"seed": 2}, "second")
    assert anew.run == "second"
    anew.close()


def test_an_older_log_is_not_asked_for_what_it_does_not_tell() -> None:
    new = OLD | {"device": "cpu", "dtype": "float32", "judge": "exact", "stop": None}
    assert differing(OLD, new) == []
    assert differing(new, new | {"dtype": "bfloat16"}) == ["dtype"]
    assert differing(new, OLD | {"judge": "exact"}) == ["device", "dtype"]
    assert differing(OLD, new | {"seed": 2}) == ["seed"]
    # of generated facts it was equal answers that counted, and nothing stopped them
    assert differing(OLD, new | {"judge": "holds", "stop": ["\n"]}) == ["judge", "stop"]
    assert differing(OLD | {"squad": "s"}, new | {"squad": "s", "judge": "holds"}) == []
    # a run that asks nothing has no rule
    assert differing({"seed": 1}, {"seed": 1}) == []


def test_a_run_is_not_resumed_on_another_device_or_file(tmp_path: Path) -> None:
    data = tmp_path / "data.json"
    data.write_text("one")
    ready = {"model": "m", "fingerprint": "f", "device": "cpu", "dtype": "float32"}

    def open_one(**changed: str) -> dict[str, Any]:
        async def call(*_: Any, **__: Any) -> dict[str, str]:
            return ready | changed

        arguments = argparse.Namespace(results=tmp_path, name="a", fresh=False, seed=1, squad=data)
        one = Session("retention", arguments, SimpleNamespace(call=call))  # type: ignore[arg-type]
        asyncio.run(one.open())
        one.log.close()
        return one.settings

    assert open_one()["squad"] == "data.json"
    with pytest.raises(SystemExit, match="dtype"):
        open_one(dtype="bfloat16")
    data.write_text("two")
    with pytest.raises(SystemExit, match="squad_sha256"):
        open_one()
    data.unlink()
    with pytest.raises(SystemExit, match=r"data\.json"):
        open_one()


def test_a_command_is_told_without_where_things_are() -> None:
    words = ["--url", "http://x", "--items", "5", "--fresh", "--results=/a", "--squad", "/b/s.json", "K=/b/c"]
    assert measured(words) == ["--items", "5", "--squad", "s.json", "K=c"]
    words = ["--also", "http://y", "--also=http://z", "--kill-at", "50", "--child", "--tenants", "3"]
    assert measured(words) == ["--also", "URL", "--also", "URL", "--kill-at", "50", "--tenants", "3"]


def replayed(*lines: bytes) -> integrity.Integrity:
    given = SimpleNamespace(client=None, arguments=None)
    run = integrity.Integrity(given)  # type: ignore[arg-type]
    run._replay(list(lines))
    return run


def test_what_two_runs_have_told_counts_once() -> None:
    run = replayed(b"0 1 1", b"1 1 0", b"0 1 1", b"0 2 1", b"killed", b"0 1 0", b"1 1 0", b"1 2 1")
    assert run.answers == [True, False, True, True]
    assert run.behind == [1, 1, 2, 2]
    assert run.turns == {0: 2, 1: 2}
    assert run.kills == [3]
    assert not run.erased
    assert replayed(b"0 1 1", b"erased").erased


def test_integrity_without_an_answer_is_shown() -> None:
    figures = integrity.summary([], [])
    assert integrity.chart(figures, 0, 1) is None
    counted = {"updates": 0, "kills_behind_answers": [], "updates_a_second": 0.0}
    told = figures | counted | {"tenants": [{"updates": 0, "version": 0}]}
    assert "| right | - |" in report.integrity(told)
    assert "| servers |" not in report.integrity(told)
    shown = report.integrity(told | {"settings": {"servers": 2, "ask_every": 5}})
    assert "| servers | 2 |" in shown
    assert "a question behind every 5" in shown


def test_a_log_of_more_servers_is_not_forgotten_by_fewer(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    Log(path, OLD, "first").close()
    with pytest.raises(SystemExit, match="2 servers"):
        asyncio.run(interrupted.forgotten(["http://127.0.0.1:9"], path))
    assert json.loads(path.read_text())["run"] == "first"


CHILD = "import os, signal; print(os.getpid(), flush=True); signal.pause()"
PARENT = f"import sys; from experiments.children import run; run([sys.executable, '-c', {CHILD!r}])"


def test_a_child_ends_with_its_parent() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.terminate()
        code = parent.wait()
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            pass
        else:
            os.kill(child, signal.SIGKILL)
            pytest.fail("it goes on")
        assert code == 128 + signal.SIGTERM


def test_looking_at_what_was_measured_does_not_change_when_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def keep(model: str, machine: str, *lines: bytes) -> dict[str, Any]:
        words = ["--results", str(tmp_path), "--tenants", "2"]
        run = Session("integrity", integrity.options().parse_args(words), SimpleNamespace())  # type: ignore[arg-type]
        run.server = {"device": "cpu", "dtype": "float32"}
        run.settings = {"fingerprint": model}
        run.arguments.words = words
        monkeypatch.setattr(session, "machine", lambda *_: machine)
        run.log = Log(tmp_path / f"{model}.jsonl", run.settings, "run")
        for line in lines:
            run.log.write(line)
        told = run.keep({"updates": 1, "updates_a_second": float(len(lines))}, None)
        run.log.close()
        assert json.loads((tmp_path / "integrity.json").read_text()) == told
        return {name: told[name] for name in ("machine", "updates_a_second", "updates")}

    first = {"machine": "quiet", "updates_a_second": 1.0, "updates": 1}
    assert keep("a", "quiet", b"0 1 1") == first
    assert keep("a", "busy") == first
    # of another model nothing has been measured, and a run that goes on measures anew
    assert keep("b", "busy") == {"machine": "busy", "updates_a_second": 0.0, "updates": 1}
    assert keep("a", "busy", b"0 2 1", b"1 1 1")["machine"] == "busy"
