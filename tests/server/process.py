"""A real server in a process of its own, as ``memoryllm serve`` starts it, on a free port of the loopback."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from tests.harness import CHECKPOINTS

ROOT = Path(__file__).parents[2]
START_SECONDS = 60.0


def until(condition: Callable[[], bool], what: str) -> None:
    """Waits for something that must come; a program that is broken fails here instead of hanging."""
    end = time.monotonic() + START_SECONDS
    while not condition():
        assert time.monotonic() < end, f"this never came: {what}"
        threading.Event().wait(0.01)


class ServerProcess:
    """``memoryllm serve`` with the given options; ready when the constructor returns. ``store`` is a directory or a
    URL."""

    def __init__(
        self, store: Path | str, model: str = str(CHECKPOINTS / "two-adapters"), **options: Any
    ) -> None:
        address = store if isinstance(store, str) else f"disk://{store}"
        flags = {"host": "127.0.0.1", "port": 0, "store": address, "model": model, **options}
        command = [sys.executable, "-m", "app.cli", "serve"]
        for name, value in flags.items():
            command += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MEMORYLLM_")}
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment | {"PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []
        self._address = threading.Event()
        self.url = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._address.wait(START_SECONDS):
            self.kill()
            raise AssertionError("the server did not start:\n" + "".join(self.lines))
        self.http = httpx.Client(base_url=self.url, timeout=30.0, trust_env=False)
        try:
            self.wait_ready()
        except AssertionError:
            self.http.close()
            self.kill()
            self._reader.join(10)
            self.process.stdout.close()  # type: ignore[union-attr]
            raise

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            found = re.search(r"listening on (http://\S+)", line)
            if found:
                self.url = found.group(1)
                self._address.set()
        self._address.set()

    def wait_ready(self) -> dict[str, Any]:
        answers: list[httpx.Response] = []

        def ready() -> bool:
            assert self.process.poll() is None, "the server ended:\n" + "".join(self.lines)
            try:
                answers.append(self.http.get("/ready"))
            except httpx.TransportError:
                return False
            return answers[-1].status_code == 200

        until(ready, "a server that is ready")
        body: dict[str, Any] = answers[-1].json()
        return body

    @property
    def worker_pid(self) -> int:
        """The worker's process id: the only child that runs ``app.worker``."""
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                command = (entry / "cmdline").read_bytes()
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
            if b"app.worker" in command and parent == self.process.pid:
                return int(entry.name)
        raise AssertionError("the server has no worker")

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.http.post(path, json=body)

    def update(self, tenant: str, text: list[int] | str, **rest: Any) -> dict[str, Any]:
        answer = self.post("/update", tenant=tenant, text=text, **rest)
        assert answer.status_code == 200, answer.text
        updated: dict[str, Any] = answer.json()
        return updated

    def tokens(self, tenant: str, prompt: list[int], count: int = 16) -> list[int]:
        answer = self.post(
            "/generate",
            tenant=tenant,
            prompt=prompt,
            max_tokens=count,
            ignore_eos=True,
            return_token_ids=True,
        )
        assert answer.status_code == 200, answer.text
        token_ids: list[int] = answer.json()["token_ids"]
        return token_ids

    def version(self, tenant: str) -> int:
        answer = self.http.get(f"/tenants/{tenant}")
        return int(answer.json()["memory_version"]) if answer.status_code == 200 else 0

    def kill(self) -> None:
        """kill -9, of the server alone; its worker must notice by itself."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        if self.process.poll() is None:
            self.process.terminate()
        return self.process.wait(60)

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.http.close()
        try:
            if self.process.poll() is None:
                self.process.terminate()
                self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        finally:
            self._reader.join(10)
            if self.process.stdout is not None:
                self.process.stdout.close()
