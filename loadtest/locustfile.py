"""Users who tell their memory something now and then and ask it more often.

    locust --locustfile loadtest/locustfile.py --host http://127.0.0.1:8000 --headless --users 8 --run-time 60s

Needs locust alone (``pip install '.[load]'``). Each user is a tenant of its own, erased at the end. An answer
from a version older than the last acknowledged update counts as a failure, whatever its status. A server with keys
needs an admin's in MEMORYLLM_API_KEY.
"""

from __future__ import annotations

import os
import random
import secrets
import time

from locust import HttpUser, between, task

PEOPLE = ["Mira Tolvan", "Jona Brandt", "Ruth Kessler", "Tomas Weil", "Ines Moravek", "Karl Osten"]
PLACES = ["Tarnovik", "Lisbon", "Aldersund", "Brenmoor", "Vesk", "Port Halden"]
LONGEST_WAIT = 30.0


class Rememberer(HttpUser):
    """One tenant: four questions to one update."""

    wait_time = between(0.05, 0.5)

    def on_start(self) -> None:
        if key := os.environ.get("MEMORYLLM_API_KEY"):
            self.client.headers["authorization"] = f"Bearer {key}"
        self.tenant = f"load-{secrets.token_hex(8)}"
        self.version = 0
        self.update()

    def on_stop(self) -> None:
        self.client.delete(f"/tenants/{self.tenant}", name="/tenants/{id}")

    @task(1)
    def update(self) -> None:
        """Tells one fact."""
        person, place = random.choice(PEOPLE), random.choice(PLACES)
        text = f"{person} lives in {place}. In spring {person} came there by train and has stayed since."
        answer = self._post("/update", {"tenant": self.tenant, "text": text})
        if answer is not None:
            self.version = answer["memory_version"]

    @task(4)
    def generate(self) -> None:
        """Asks for a fact that may have been told."""
        question = f"Where does {random.choice(PEOPLE)} live?"
        self._post(
            "/generate",
            {"tenant": self.tenant, "messages": [{"role": "user", "content": question}], "max_tokens": 16},
        )

    def _post(self, path: str, body: dict[str, object]) -> dict[str, int] | None:
        """The answer, or None; a server that asks to be left alone for a while is."""
        with self.client.post(path, json=body, catch_response=True) as response:
            if response.status_code == 200:
                answer: dict[str, int] = response.json()
                if answer["memory_version"] < self.version:
                    response.failure("an acknowledged update is missing")
                return answer
            response.failure(f"status {response.status_code}")
            wait = response.headers.get("retry-after") if response.status_code in {429, 503} else None
        if wait is not None:
            time.sleep(min(float(wait), LONGEST_WAIT))
        return None
