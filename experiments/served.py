"""``memoryllm serve`` of one model in a process of its own, for experiments that compare models."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

import httpx

START_SECONDS = 600.0


class Served:
    """Serves on a free port of the loopback until the block is left. Its output goes to ``log``.

    Raises RuntimeError if it does not become ready.
    """

    def __init__(self, model: Path, store: Path, log: Path) -> None:
        self._command = [sys.executable, "-m", "app.cli", "serve", "--host", "127.0.0.1", "--port", "0"]
        self._command += ["--model", str(model), "--store", f"disk://{store}", "--log-level", "warning"]
        self._log = log

    def __enter__(self) -> str:
        """The server's address, once it answers."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MEMORYLLM_")}
        environment["PYTHONUNBUFFERED"] = "1"
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
            )
        try:
            end = time.monotonic() + START_SECONDS
            while self._process.poll() is None and time.monotonic() < end:
                found = re.search(r"listening on (http://\S+)", self._log.read_text("utf-8", "replace"))
                if found and _ready(found.group(1)):
                    return found.group(1)
                threading.Event().wait(0.1)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        self.__exit__(None, None, None)
        raise RuntimeError(f"the server did not become ready; see {self._log}")

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", timeout=10.0, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False
