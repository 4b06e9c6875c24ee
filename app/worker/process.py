"""What a worker process does: it builds itself from its settings, then runs until it is drained."""

from __future__ import annotations

import argparse
import gc
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import structlog
from rich.console import Console
from rich.progress import Progress

from app import logs
from app.errors import ServiceError
from app.messages import Fatal, Fetching, Ready
from app.model.checkpoint import CheckpointError, resolve
from app.model.config import UnsupportedModel
from app.settings import Settings
from app.store.base import Store
from app.store.url import open_store
from app.worker.budget import CannotStart, unbuilt
from app.worker.build import Built, build, pick_device
from app.worker.loop import Background, Loop, exit_with_parent
from app.worker.priority import step_back

log = structlog.get_logger("worker")

_FETCHING_SECONDS = 5.0


def _text_key(path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        key = bytes.fromhex(path.read_text("ascii").strip())
    except (OSError, ValueError) as error:
        raise CannotStart(f"the text key file {path} cannot be read as hex digits") from error
    if len(key) != 32:
        raise CannotStart(f"the text key file {path} must hold 64 hex digits")
    return key


def _fetch(model: str, loop: Loop) -> Path:
    """The model's directory. A download may take longer than a start may: the API is told that it is under way, and
    when it is done. One that stands still is given up by huggingface_hub itself. Raises CheckpointError."""
    with ThreadPoolExecutor(1) as thread:
        fetching = thread.submit(resolve, model)
        if not wait([fetching], _FETCHING_SECONDS).done:
            log.info("downloading the model", model=model)
            loop.send([Fetching()])
            while not wait([fetching], _FETCHING_SECONDS).done:
                loop.send([Fetching()])
            loop.send([Fetching()])
        return fetching.result()


def _build(settings: Settings, store: Store, background: Background, loop: Loop) -> Built:
    """Builds with a progress bar over layers where a person watches."""
    directory = _fetch(settings.model, loop)
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as bar:
        task = bar.add_task(f"loading {settings.model}", total=None)
        return build(
            settings,
            store,
            background.submit,
            lambda done, total: bar.update(task, completed=done, total=total),
            directory,
        )


def _give_up(loop: Loop, reason: str) -> int:
    loop.send([Fatal(reason)])
    loop.close()
    return 1


def main() -> int:
    parser = argparse.ArgumentParser(prog="app.worker")
    parser.add_argument("--endpoint", required=True)
    endpoint = parser.parse_args().endpoint
    told = sys.stdin.buffer.readline()
    if not told:
        # whoever started this worker ahead has ended before it had settings for it
        return 0
    settings = Settings.model_validate_json(told)
    exit_with_parent()
    # a Ctrl-C in the terminal reaches the whole group; the API decides when a worker ends
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logs.configure(settings)
    logs.own_process()
    background = Background()
    loop = Loop(endpoint, background)
    try:
        if pick_device(settings.device).type == "cpu":
            step_back(settings.worker_nice)
        store = open_store(
            settings.store, keep_text=settings.keep_text, text_key=_text_key(settings.text_key_file)
        )
        built = _build(settings, store, background, loop)
    except (CannotStart, CheckpointError, UnsupportedModel, ServiceError, ValueError, OSError) as error:
        return _give_up(loop, str(error))
    except (RuntimeError, MemoryError) as error:
        reason = unbuilt(error)
        if reason is None:
            log.exception("the worker could not be built")
            reason = f"the worker could not be built: {error}"
        return _give_up(loop, reason)
    # the collector would hold a step up for a tenth of a second to look through modules that stay to the end
    gc.freeze()
    gc.enable()
    loop.send([Ready(built.info, pid=os.getpid())])
    loop.run(built.engine)
    loop.close()
    store.close()
    return 0
