"""What a worker process makes of its settings: its parts get what they say, and so does the store."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from app.settings import Settings
from app.store.disk import DiskStore
from app.worker.scheduler import Limits
from app.worker.updates import compaction_interval
from tests.harness import CHECKPOINTS

KEY = bytes(range(32))
SECRET = "The treasure is under the oak."
# a worker as it is started, whose loop says what it was given, writes a text to the store, and ends
LOOKS = f"""
import json, runpy
from dataclasses import asdict
import msgspec
from app.messages import Fatal, Ready
from app.store.base import Manifest
from app.worker import process

class Loop:
    def __init__(self, endpoint, background):
        self.background = background

    def send(self, answers):
        for answer in answers:
            assert not isinstance(answer, Fatal), answer.message
            if isinstance(answer, Ready):
                self.info = answer.model

    def run(self, engine):
        store, warm = engine.residency.store, engine.residency.warm
        store.create(Manifest("ada", 1, "f", 0.0))
        store.commit("ada", 0, b"the block", time=1.0, tokens=16, text={SECRET!r})
        told = {{
            "model": msgspec.to_builtins(self.info),
            "limits": asdict(engine.scheduler.limits),
            "pace": engine.scheduler.pace._share,
            "compacted_after": engine.updates._compacted_after,
            "warm_bytes": warm._unmade * warm.each,
            "warm_each": warm.each,
        }}
        print(json.dumps(told), flush=True)

    def close(self):
        self.background.close()

process.Loop = Loop
runpy.run_module("app.worker", run_name="__main__")
"""


def started(store: Path, **settings: Any) -> Any:
    """What a worker that was started with these settings was made of; it has ended."""
    chosen = {"model": str(CHECKPOINTS / "plain"), "device": "cpu", "worker_nice": 0, **settings}
    told = Settings(store=f"disk://{store}", **chosen).model_dump_json()
    command = [sys.executable, "-c", LOOKS, "--endpoint", "ipc:///nowhere"]
    # its standard input stays open: when that closes it ends at once
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(told + "\n")
        process.stdin.flush()
        said = process.stdout.read()
        assert process.wait(60) == 0
    return json.loads(said)


@pytest.mark.parametrize("kept", ["clear", "encrypted", "not at all"])
def test_texts_are_kept_as_the_settings_say(tmp_path: Path, kept: str) -> None:
    (tmp_path / "key").write_text(KEY.hex() + "\n")
    settings: dict[str, dict[str, Any]] = {
        "clear": {},
        "encrypted": {"text_key_file": tmp_path / "key"},
        "not at all": {"keep_text": False},
    }
    started(tmp_path / "store", **settings[kept])
    files = [path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file()]
    assert any(b"the block" in data for data in files)
    assert any(SECRET.encode() in data for data in files) == (kept == "clear")
    store = DiskStore(tmp_path / "store", text_key=KEY if kept == "encrypted" else None)
    assert [record.text for record in store.history("ada")] == [None if kept == "not at all" else SECRET]
    store.close()


def test_the_worker_is_as_its_settings_and_its_checkpoint_say(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(CHECKPOINTS / "plain", model)
    wants = {"temperature": 0.6, "top_p": 0.9, "top_k": 50, "repetition_penalty": 1.1}
    (model / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "eos_token_id": [2, 7], **wants})
    )
    limits = {
        "step_tokens": 96,
        "max_running": 3,
        "queue_requests": 11,
        "queue_requests_tenant": 7,
        "queue_tokens": 5000,
        "update_share": 0.4,
    }
    found = started(
        tmp_path / "store",
        model=str(model),
        warm_bytes=2**20,
        served_model_name="org/bot",
        max_sequence=300,
        context_tokens=1000,
        **limits,
    )
    assert {name: found["model"][name] for name in wants} == wants
    assert (found["model"]["stop_tokens"], found["model"]["max_sequence"]) == ([2, 7], 300)
    assert found["model"]["name"] == "org/bot"
    assert {name: found["limits"][name] for name in limits} == limits
    assert all(value != getattr(Limits(), name) for name, value in limits.items())
    assert found["pace"] == 0.4
    assert 2**20 - found["warm_each"] < found["warm_bytes"] <= 2**20
    assert found["compacted_after"] == compaction_interval(found["model"]["num_blocks"])
    # a sequence is never allowed what there is no room for at all
    narrow = started(tmp_path / "narrow", model=str(model), max_sequence=300, context_tokens=100)
    assert narrow["model"]["max_sequence"] == 96
