"""What both processes log when something breaks: where it broke, and nothing of what a user wrote."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import structlog

from app import logs
from app.settings import Settings
from app.worker import process as worker
from app.worker.loop import Background

SECRET = "swordfish-7701"


def break_something(text: str) -> None:
    words = [text, text.upper()]
    raise RuntimeError(f"{len(words)} words cannot be kept")


def quote(text: str) -> None:
    """As a look-up, a parser or a codec does; and what is on top of it says nothing of it either."""
    try:
        {}[text]
    except KeyError as error:
        raise ExceptionGroup(text, [ValueError(f"not a number: {text}"), OSError(28, "no room")]) from error


def log_a_failure(failing: Callable[[str], None] = break_something) -> None:
    background = Background()
    with logs.about("job 7"):
        background.submit(lambda: failing(SECRET), lambda result, error: None)
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
        line = json.loads(told.splitlines()[0])
        assert (line["event"], line["job"]) == ("background work failed", "job 7")


def test_the_worker_logs_as_the_server_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Settings(store="nowhere://", log_json=True)
    monkeypatch.setattr(sys, "argv", ["worker", "--endpoint", "inproc://nobody"])
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(settings.model_dump_json().encode())))
    monkeypatch.setattr(worker, "exit_with_parent", lambda: None)
    monkeypatch.setattr(worker.signal, "signal", lambda *_: None)
    monkeypatch.setattr(worker.Loop, "send", lambda *_: None)
    owned: list[bool] = []
    monkeypatch.setattr(logs, "own_process", lambda: owned.append(True))
    structlog.reset_defaults()
    try:
        assert worker.main() == 1
        log_a_failure()
    finally:
        logs.configure(Settings(log_level="error"))
    assert SECRET not in capsys.readouterr().err
    assert owned


@pytest.mark.parametrize("log_json", [False, True])
def test_of_an_exception_that_may_quote_only_its_kind_and_place_are_told(
    capsys: pytest.CaptureFixture[str], log_json: bool
) -> None:
    logs.configure(Settings(log_json=log_json))
    try:
        log_a_failure(quote)
    finally:
        logs.configure(Settings(log_level="error"))
    told = capsys.readouterr().err
    for word in (
        "builtins.KeyError",
        "builtins.ExceptionGroup",
        "builtins.ValueError",
        "no room",
        "in quote",
    ):
        assert word in told, word
    assert SECRET not in told


def test_what_is_done_with_a_result_is_about_the_same_job() -> None:
    background = Background()
    about: list[object] = []

    def note(*_: object) -> None:
        about.append(structlog.contextvars.get_contextvars().get("job"))

    for job in ("a", "b"):
        with logs.about(job):
            background.submit(note, lambda result, error: (note(), background.submit(note, note))[0])
    for _ in range(200):
        background.drain()
        if len(about) == 8:
            break
        background.wake.setblocking(True)
        background.wake.settimeout(5)
        background.wake.recv(1)
        background.wake.setblocking(False)
    background.close()
    assert sorted(map(str, about)) == ["a"] * 4 + ["b"] * 4
    assert structlog.contextvars.get_contextvars() == {}


CRASHES = """
import logging, sys, threading, warnings
from app import logs
from app.settings import Settings
logs.configure(Settings(log_json=True))
logs.own_process()
secret = "swordfish-7701"
logging.getLogger("uvicorn.error").warning("Invalid HTTP request received.")
warnings.warn("this will be taken away")
thread = threading.Thread(target=lambda: {}[secret])
thread.start()
thread.join()
int(secret)
"""


def test_what_nobody_catches_and_what_libraries_say_is_structured_too() -> None:
    done = subprocess.run([sys.executable, "-c", CRASHES], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [(line.get("logger"), line["level"]) for line in lines] == [
        ("uvicorn.error", "warning"),
        ("py.warnings", "warning"),
        (None, "critical"),
        (None, "critical"),
    ]
    assert "KeyError" in lines[2]["exception"]
    assert "ValueError" in lines[3]["exception"]
    assert SECRET not in "".join(line.get("exception", line["event"]) for line in lines)
    assert all(line["timestamp"] for line in lines)
