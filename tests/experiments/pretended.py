"""A server that is none: its memories are lists of texts, and what it says and how likely it finds something is up to
the test."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from experiments.client import EXISTS, Client, Scores

K, BLOCKS = 2, 50
READY = {"model": "pocket", "fingerprint": "f", "device": "cpu", "dtype": "float32"}


def nothing_said(_: str, __: str) -> str:
    return ""


def nothing_likely(_: list[str], __: str, ___: str) -> Scores:
    return Scores([-1.0], [False], [0])


class Pretended:
    """Takes the place of ``Client.call``, so that all else of the client is the real one.

    ``says(tenant, prompt)`` is the answer, ``scores(texts of the memory, prompt, continuation)`` the score. Of updates
    only the first ``patience`` are taken; ``updated`` names the tenant of each, once if it came twice with its key.
    """

    def __init__(
        self,
        says: Callable[[str, str], str] = nothing_said,
        scores: Callable[[list[str], str, str], Scores] = nothing_likely,
    ) -> None:
        self.says, self.scores = says, scores
        self.memories: dict[str, list[str]] = {}
        self._keys: dict[str, set[str]] = defaultdict(set)
        self.updated: list[str] = []
        self.patience = sys.maxsize

    def run(
        self, monkeypatch: pytest.MonkeyPatch, folder: Path, main: Callable[[], int], *words: str
    ) -> dict[str, Any]:
        """What the experiment of this ``main`` measures here."""

        async def call(_: Client, method: str, path: str, body: Any = None, **__: bool) -> dict[str, Any]:
            return self.call(method, path, body)

        monkeypatch.setattr(Client, "call", call)
        name = main.__module__.removeprefix("experiments.")
        monkeypatch.setattr(sys, "argv", [name, "--results", str(folder), "--quiet", *words])
        assert main() == 0
        told: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
        return told

    def call(self, method: str, path: str, body: Any) -> dict[str, Any]:
        """Raises httpx.HTTPStatusError."""
        match [method, *path.strip("/").split("/")]:
            case ["GET", "ready"]:
                return READY
            case ["GET", listing] if listing.startswith("tenants?"):
                after = listing.rpartition("after=")[2]
                return {"tenants": sorted(name for name in self.memories if name > after)}
            case ["POST", "tenants"]:
                return self._create(body["id"], [])
            case ["POST", "tenants", tenant, "fork"]:
                return self._create(body["target"], self.memories[tenant])
            case ["DELETE", "tenants", tenant]:
                self._keys.pop(tenant, None)
                if self.memories.pop(tenant, None) is None:
                    raise refusal(404)
                return {}
            case ["GET", "tenants", tenant, *_]:
                return self._view(tenant)
            case ["POST", "update"]:
                return self._update(body["tenant"], body["text"], body["idempotency_key"])
            case ["POST", "generate"]:
                prompt = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
                return {"text": f" {self.says(body['tenant'], prompt)}\n"}
            case ["POST", "score"]:
                texts = self.memories.get(body["tenant"], [])
                told = self.scores(texts, body["prompt"], body["continuation"])
                return {"logprobs": told.logprobs, "greedy": told.greedy, "greedy_token_ids": told.first}
        raise AssertionError(f"{method} {path}")

    def _create(self, tenant: str, texts: list[str]) -> dict[str, Any]:
        if tenant in self.memories:
            raise refusal(409, EXISTS)
        self.memories[tenant] = list(texts)
        return {}

    def _update(self, tenant: str, text: str, key: str) -> dict[str, Any]:
        if len(self.updated) >= self.patience:
            raise refusal(500)
        if key not in self._keys[tenant]:
            self._keys[tenant].add(key)
            self.updated.append(tenant)
            self.memories[tenant].append(text)
        return {"memory_version": len(self.memories[tenant])}

    def _view(self, tenant: str) -> dict[str, Any]:
        """Nothing is forgotten."""
        version = len(self.memories[tenant])
        versions = [{"version": number + 1, "tokens": K} for number in range(version)]
        shape = {"num_tokens": K, "num_blocks": BLOCKS}
        return {"memory_version": version, "layers": [{"versions": versions}]} | shape


def refusal(status: int, code: str = "none") -> httpx.HTTPStatusError:
    request = httpx.Request("POST", "http://server")
    response = httpx.Response(status, json={"error": {"code": code}}, request=request)
    return httpx.HTTPStatusError(f"{status}", request=request, response=response)
