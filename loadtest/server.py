"""A server of the load test's own: a free port, a temporary store, and settings that a scenario asks for."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).parents[1]
START_SECONDS = 120.0
STOP_SECONDS = 90.0
_PAGE = os.sysconf("SC_PAGE_SIZE")


def environment() -> dict[str, str]:
    """Ours without the settings that the caller has made for a server of his own."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MEMORYLLM_")}
    return kept | {"PYTHONUNBUFFERED": "1"}


class Server:
    """``memoryllm serve`` with ``options``, ready when the constructor returns. Its log goes to ``log``.

    Raises RuntimeError if it does not start.
    """

    def __init__(self, store: Path, log: Path, **options: Any) -> None:
        flags = {"host": "127.0.0.1", "port": 0, "store": f"disk://{store}", "log-level": "warning"} | options
        command = [sys.executable, "-m", "app.cli", "serve"]
        for name, value in flags.items():
            command += [f"--{name.replace('_', '-')}", str(value)]
        self._log = log.open("ab")
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        self.url = ""
        self._address = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            self._wait_ready()
            self.worker_pid = self._worker()
        except BaseException:
            self.kill()
            raise

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if found := re.search(r"listening on (http://\S+)", line):
                self.url = found.group(1)
                self._address.set()
        self._address.set()

    def _wait_ready(self) -> None:
        until = time.monotonic() + START_SECONDS
        self._address.wait(START_SECONDS)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        while self.url and self.process.poll() is None and time.monotonic() < until:
            try:
                with opener.open(f"{self.url}/ready", timeout=5):
                    return
            except OSError:
                time.sleep(0.02)
        raise RuntimeError(f"the server did not start; its log is {self._log.name}")

    def _worker(self) -> int:
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                if parent == self.process.pid and b"app.worker" in (entry / "cmdline").read_bytes():
                    return int(entry.name)
            except OSError:
                continue
        raise RuntimeError("the server has no worker")

    def resident_bytes(self) -> tuple[int, int]:
        """Resident set of the API process and of the worker; 0 of one that is gone."""
        return _resident(self.process.pid), _resident(self.worker_pid)

    def cpu_seconds(self) -> tuple[float, float]:
        """Processor time that the API process and the worker have used so far."""
        return _cpu(self.process.pid), _cpu(self.worker_pid)

    def terminate(self) -> None:
        """SIGTERM, and no waiting."""
        self.process.send_signal(signal.SIGTERM)

    def wait(self) -> int | None:
        """The exit code, or None if it does not end and had to be killed."""
        try:
            code: int | None = self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            code = None
        self.kill()
        return code

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)
        self._reader.join(10)
        if self.process.stdout is not None:
            self.process.stdout.close()
        self._log.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.terminate()
            self.wait()
        else:
            self.kill()


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    except OSError:
        return 0


def _cpu(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def scratch() -> tempfile.TemporaryDirectory[str]:
    """A place for a store. Where ``TMPDIR`` says; a RAM disk would flatter updates."""
    return tempfile.TemporaryDirectory(prefix="loadtest-")
