"""The real process killed at any moment: every acknowledged version comes back, and nothing comes twice."""

from __future__ import annotations

import os
import random
import re
import signal
import threading
from pathlib import Path

import httpx
import pytest
import torch

from app.memory.codec import Pool, decode_block, decode_snapshot
from app.memory.replay import replay
from app.model.checkpoint import load_weights
from app.model.config import read_config
from app.store.base import Manifest
from app.store.disk import DiskStore
from tests.harness import CHECKPOINTS
from tests.server.process import ServerProcess, until

rng = random.Random(7)
PROMPT = [5, 6, 7, 8, 9]


def text(length: int = 20) -> list[int]:
    return [rng.randrange(3, 320) for _ in range(length)]


def stored_pool(path: Path, tenant: str, *, compacted: bool = False) -> Pool:
    """The tenant's pool as the store holds it; the server must not be running."""
    store = DiskStore(path)
    manifest = store.load(tenant)
    assert isinstance(manifest, Manifest)
    assert not compacted or manifest.snapshot is not None
    directory = CHECKPOINTS / "two-adapters"
    config = read_config(directory)
    weights, _ = load_weights(directory, config)
    base = Pool(weights.memory, torch.zeros(config.num_layers, config.pool_size, dtype=torch.int32))
    if manifest.snapshot is not None:
        base = decode_snapshot(store.read(tenant, manifest.snapshot.blob))
    pool = replay(base, [(b.version, decode_block(store.read(tenant, b.blob))) for b in manifest.blocks])
    store.close()
    return pool


def test_a_killed_server_remembers_every_acknowledged_update(tmp_path: Path) -> None:
    """kill -9 while several tenants are being updated; then the same requests again, by their keys."""
    store = tmp_path / "store"
    acknowledged: dict[str, int] = {}
    sent: dict[str, list[tuple[str, list[int]]]] = {name: [] for name in ("ada", "bob")}
    for round_number in range(3):
        with ServerProcess(store) as server:
            for name, updates in sent.items():
                assert server.version(name) >= acknowledged.get(name, 0)
                # what was in flight may or may not have been written; asked again it is written once
                for key, tokens in updates:
                    server.update(name, tokens, idempotency_key=key)
                assert server.version(name) == len(updates)
                acknowledged[name] = len(updates)
            started = threading.Barrier(3)

            def work(
                name: str,
                server: ServerProcess = server,
                barrier: threading.Barrier = started,
                round_number: int = round_number,
            ) -> None:
                with httpx.Client(base_url=server.url, timeout=30.0, trust_env=False) as http:
                    barrier.wait()
                    for number in range(100):
                        tokens = [3 + (7 * number + i) % 300 for i in range(20)]
                        key = f"{round_number}-{number}"
                        sent[name].append((key, tokens))
                        body = {"tenant": name, "text": tokens, "idempotency_key": key}
                        try:
                            answer = http.post("/update", json=body)
                        except httpx.TransportError:
                            return
                        assert answer.status_code == 200
                        acknowledged[name] += 1

            threads = [threading.Thread(target=work, args=(name,)) for name in sent]
            for thread in threads:
                thread.start()
            started.wait()
            before = dict(acknowledged)
            until(
                lambda: all(acknowledged[name] >= before[name] + 3 + round_number for name in sent),  # noqa: B023
                "updates of every tenant",
            )
            server.kill()
            for thread in threads:
                thread.join()
    with ServerProcess(store) as server:
        for name in sent:
            assert server.version(name) >= acknowledged[name]
            assert server.version(name) <= len(sent[name])


def test_a_restart_keeps_every_bit(tmp_path: Path) -> None:
    store = tmp_path / "store"
    with ServerProcess(store) as server:
        # past a compaction (the model has 6 blocks), so that a snapshot is read as well
        for _ in range(9):
            server.update("ada", text())
        compactions = re.compile(rb"^memoryllm_store_compactions_total [1-9]", re.MULTILINE)
        until(lambda: compactions.search(server.http.get("/metrics").content) is not None, "a compaction")
        tokens = server.tokens("ada", PROMPT)
        memory = server.http.get("/tenants/ada/memory").json()
        server.kill()
    before = stored_pool(store, "ada", compacted=True)
    with ServerProcess(store) as server:
        assert server.version("ada") == 9
        assert server.tokens("ada", PROMPT) == tokens
        assert server.http.get("/tenants/ada/memory").json() == memory
        assert server.stop() == 0
    after = stored_pool(store, "ada")
    assert torch.equal(before.hidden, after.hidden)
    assert torch.equal(before.born, after.born)


def test_a_dead_worker_is_replaced_and_its_requests_get_503(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "store") as server:
        server.update("ada", text())
        expected = server.tokens("ada", PROMPT)
        answers: list[httpx.Response] = []
        body = {"tenant": "ada", "prompt": PROMPT, "max_tokens": 4000, "ignore_eos": True, "stream": True,
                "return_token_ids": True}  # fmt: skip
        with httpx.Client(base_url=server.url, timeout=30.0, trust_env=False) as http:
            with http.stream("POST", "/generate", json=body) as streaming:
                lines = streaming.iter_lines()
                assert next(lines).startswith("data:")
                waiting = threading.Thread(
                    target=lambda: answers.append(
                        server.post(
                            "/generate", tenant="ada", prompt=PROMPT, max_tokens=4000, ignore_eos=True
                        )
                    )
                )
                waiting.start()
                # one that has no token yet would be sent to the new worker
                running = b"memoryllm_time_to_first_token_seconds_count 3.0"
                until(lambda: running in server.http.get("/metrics").content, "both requests running")
                os.kill(server.worker_pid, signal.SIGKILL)
                assert any('"code":"worker_unavailable"' in line.replace(" ", "") for line in lines)
            waiting.join()
        (refused,) = answers
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "worker_unavailable"
        assert int(refused.headers["retry-after"]) >= 1
        server.wait_ready()
        assert server.tokens("ada", PROMPT) == expected
        assert server.version("ada") == 1


def test_two_servers_cannot_share_a_store(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "store") as server:
        server.update("ada", text())
        with pytest.raises(AssertionError, match="another server has the store"):
            ServerProcess(tmp_path / "store")
        assert server.version("ada") == 1
