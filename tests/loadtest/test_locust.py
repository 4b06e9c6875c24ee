"""Locust's users against a real server, for a few seconds, as the documentation says to start them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.server.process import ROOT, ServerProcess


def test_locusts_people_are_served_and_leave_nothing(tmp_path: Path) -> None:
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("LOCUST_", "MEMORYLLM_"))}
    words = "--headless --users 6 --spawn-rate 6 --run-time 3s --stop-timeout 30s --only-summary --json"
    # of this one's first six people one sends a burst of updates, most read streams, and some hang up
    keep["LOAD_SEED"] = "4"
    with ServerProcess(tmp_path / "store", model="pocket") as server:
        command = [
            sys.executable,
            "-m",
            "locust",
            "--locustfile",
            "loadtest/locustfile.py",
            "--host",
            server.url,
        ]
        done = subprocess.run(
            [*command, *words.split()], cwd=ROOT, env=keep, capture_output=True, text=True, timeout=100
        )
        # 1 if any request failed, a stream had no end, or an acknowledged update was missing
        assert done.returncode == 0, done.stdout + done.stderr
        counted = {row["name"]: row for row in json.loads(done.stdout)}
        assert {"/generate (stream)", "/update", "/tenants/{id}"} <= counted.keys()
        assert not any(row["num_failures"] for row in counted.values())
        metrics = server.http.get("/metrics").text
        updates = 'memoryllm_http_requests_total{method="POST",route="/update",status="200"}'
        assert f"{updates} {float(counted['/update']['num_requests'])}" in metrics
        assert server.http.get("/tenants").json()["total"] == 0
