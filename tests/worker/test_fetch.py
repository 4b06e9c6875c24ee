"""A model that has to be downloaded first: the API hears that it is under way."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import cast

import pytest

from app.messages import Answer, Fetching
from app.model.checkpoint import CheckpointError
from app.worker import process
from app.worker.loop import Loop


class Sent:
    """Takes what a loop would send; ``enough`` is set behind the third."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.enough = threading.Event()

    def send(self, answers: list[Answer]) -> None:
        self.answers += answers
        if len(self.answers) == 3:
            self.enough.set()


def test_a_download_is_told_of_until_it_is_done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sent = Sent()

    def download(model: str) -> Path:
        assert sent.enough.wait(60)
        return tmp_path / model

    monkeypatch.setattr(process, "_FETCHING_SECONDS", 0.001)
    monkeypatch.setattr(process, "resolve", download)
    assert process._fetch("some/model", cast("Loop", sent)) == tmp_path / "some/model"
    # once more when it is there: loading has its time from then on
    assert sent.answers == [Fetching()] * len(sent.answers)
    assert len(sent.answers) >= 4


def test_a_model_that_is_here_is_not_told_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sent = Sent()
    monkeypatch.setattr(process, "_FETCHING_SECONDS", 60.0)
    assert process._fetch(str(tmp_path), cast("Loop", sent)) == tmp_path
    with pytest.raises(CheckpointError, match="no such directory"):
        process._fetch("/nowhere/model", cast("Loop", sent))
    assert sent.answers == []
