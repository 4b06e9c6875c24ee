"""People (``loadtest/people.py``) against any server, as locust's users.

    locust --locustfile loadtest/locustfile.py --host http://127.0.0.1:8000 --headless --users 8 --run-time 60s

Needs locust alone (``pip install locust``). The users share ``TENANTS`` memories, drawn by a Zipf law and erased at
the end. An answer from a version older than the last acknowledged update counts as a failure, whatever its status, and
so does a stream without its end. A server with keys needs an admin's in MEMORYLLM_API_KEY; the same LOAD_SEED makes the
same people.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import sys
import time
from pathlib import Path
from typing import Any

from locust import HttpUser, constant, events, task

# locust puts this file's folder on the path, not the one above
sys.path.append(str(Path(__file__).parents[1]))
from loadtest.people import Act, Crowd, Habits, away

TENANTS = 32

_RUN = secrets.token_hex(4)
_CROWD = Crowd(
    [f"load-{_RUN}-{number}" for number in range(TENANTS)],
    random.Random(os.environ.get("LOAD_SEED")),
    Habits(fixed_length=False),
)
# the newest acknowledged version of each tenant that anybody here has touched
_versions: dict[str, int] = {}


class Rememberer(HttpUser):
    """One session after another: perhaps some updates, then a chat."""

    wait_time = constant(0)

    def on_start(self) -> None:
        if key := os.environ.get("MEMORYLLM_API_KEY"):
            self.client.headers["authorization"] = f"Bearer {key}"

    @task
    def session(self) -> None:
        """Who is refused leaves, and comes back when the server said."""
        session = _CROWD.session()
        _versions.setdefault(session.tenant, 0)
        for act in session.acts:
            time.sleep(act.think)
            if not self._act(session.tenant, act):
                return

    def _act(self, tenant: str, act: Act) -> bool:
        known = _versions[tenant]
        body = {"tenant": tenant, **act.body}
        streamed = bool(act.body.get("stream"))
        with self.client.post(
            f"/{act.kind}",
            json=body,
            stream=streamed,
            catch_response=True,
            name=f"/{act.kind}{' (stream)' * streamed}",
        ) as response:
            if response.status_code != 200:
                response.failure(f"status {response.status_code}")
                if response.status_code in {429, 503}:
                    time.sleep(away(response.headers.get("retry-after", "")))
                return False
            answer = _read(response, act.hang_up) if streamed else response.json()
            if answer is None:
                response.failure("the stream was cut")
                return False
            version = answer.get("memory_version", known)
            if version < known:
                response.failure("an acknowledged update is missing")
            if act.kind == "update":
                _versions[tenant] = max(_versions[tenant], version)
        return True


def _read(response: Any, hang_up: int) -> dict[str, Any] | None:
    """The last event of a stream, or nothing in it for a reader who leaves; None if it has no end."""
    told: dict[str, Any] = {}
    for number, line in enumerate(line for line in response.iter_lines() if line.startswith(b"data: ")):
        if line == b"data: [DONE]":
            return told
        if hang_up and number >= hang_up:
            response.close()
            return {}
        told = json.loads(line[6:])
    return None


@events.test_stop.add_listener
def erase(environment: Any, **_: Any) -> None:
    """Takes down the memories that this process has used."""
    user = Rememberer(environment)
    user.on_start()
    for tenant in list(_versions):
        user.client.delete(f"/tenants/{tenant}", name="/tenants/{id}")
