"""A server that an experiment starts does not outlast it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from experiments import served
from experiments.served import Served

SERVER = "import signal; print('listening on http://127.0.0.1:9', flush=True); signal.pause()"


def test_one_that_is_given_up_while_it_starts_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Served(tmp_path, tmp_path / "store", tmp_path / "log")
    one._command = [sys.executable, "-c", SERVER]

    def leave(_: str) -> bool:
        raise SystemExit(143)

    monkeypatch.setattr(served, "_ready", leave)
    with pytest.raises(SystemExit):
        one.__enter__()
    try:
        assert one._process.poll() is not None
    finally:
        one._process.kill()
        one._process.wait()
