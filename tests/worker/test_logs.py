"""What both processes log when something breaks: where it broke, and nothing of what a user wrote."""

from __future__ import annotations

import io
import json
import sys
from types import SimpleNamespace

import pytest
import structlog

from app import logs
from app.settings import Settings
from app.worker import __main__ as worker
from app.worker.loop import Background

SECRET = "swordfish-7701"


def break_something(text: str) -> None:
    words = [text, text.upper()]
    raise RuntimeError(f"{len(words)} words cannot be kept")


def log_a_failure() -> None:
    background = Background()
    background.submit(lambda: break_something(SECRET), lambda result, error: None)
    background.close()


@pytest.mark.parametrize("log_json", [False, True])
def test_a_traceback_shows_no_variables(capsys: pytest.CaptureFixture[str], log_json: bool) -> None:
    logs.configure(Settings(log_json=log_json))
    try:
        log_a_failure()
    finally:
        logs.configure(Settings(log_level="error"))
    told = capsys.readouterr().err
    assert "words cannot be kept" in told
    assert "break_something" in told
    assert SECRET not in told
    assert SECRET.upper() not in told
    if log_json:
        assert json.loads(told.splitlines()[0])["event"] == "background work failed"


def test_the_worker_logs_as_the_server_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Settings(store="nowhere://", log_json=True)
    monkeypatch.setattr(sys, "argv", ["worker", "--endpoint", "inproc://nobody"])
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(settings.model_dump_json().encode())))
    monkeypatch.setattr(worker, "exit_with_parent", lambda: None)
    monkeypatch.setattr(worker.signal, "signal", lambda *_: None)
    monkeypatch.setattr(worker.Loop, "send", lambda *_: None)
    structlog.reset_defaults()
    try:
        assert worker.main() == 1
        log_a_failure()
    finally:
        logs.configure(Settings(log_level="error"))
    assert SECRET not in capsys.readouterr().err
