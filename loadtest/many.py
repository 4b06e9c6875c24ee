"""Many tenants on disk, few of them resident: hit rates, errors, and whether the worker's memory grows.

    python -m loadtest.many --tenants 10000 --slots 16 --requests 4000

Makes a store of its own with that many tenants, starts a server on it whose budget holds ``--slots`` pools, and
sends generations and updates of tenants drawn by a Zipf law. Everything is taken down at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table

from app.memory.arena import Arena
from app.model.backbone import Backbone
from app.model.checkpoint import load_weights, resolve
from app.model.config import read_config
from app.store.base import Manifest
from app.store.disk import DiskStore

TEXT = "Mira Tolvan lives in Tarnovik. She works at the old harbour and has a dog called Brusso. It is number {}."
SAMPLES = 8


@dataclass
class Outcome:
    """``seconds`` of each answered request; ``rss`` MiB of the worker at even distances of the run."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: {"generate": [], "update": []})
    errors: Counter[str] = field(default_factory=Counter)
    rss: list[float] = field(default_factory=list)
    metrics: str = ""


def make_store(root: Path, tenants: int, fingerprint: str) -> None:
    store = DiskStore(root)
    for index in range(tenants):
        store.create(Manifest(tenant=f"t{index}", seed=index, fingerprint=fingerprint, created=time.time()))
    store.close()


def budget(backbone: Backbone, slots: int) -> int:
    """``--resident-bytes`` for exactly ``slots`` pools (at least 8) on a CPU: each with a copy, and eight more."""
    copy = Arena.bytes_per_copy(backbone)
    return slots * (Arena.bytes_per_pool(backbone) + copy) + 8 * copy


def start(root: Path, model: str, resident: int, warm: int) -> tuple[subprocess.Popen[str], str]:
    """The server and its address. Raises RuntimeError if it does not start."""
    options = {"host": "127.0.0.1", "port": 0, "store": f"disk://{root}", "model": model}
    options |= {"resident-bytes": resident, "warm-bytes": warm}
    command = [sys.executable, "-m", "app.cli", "serve"]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert server.stdout is not None
    for line in server.stdout:
        found = re.search(r"listening on (http://\S+)", line)
        if found:
            # nobody reads on, and a full pipe would hold the server up
            threading.Thread(target=server.stdout.read, daemon=True).start()
            return server, found.group(1)
    raise RuntimeError("the server did not start")


def worker_rss(server: int) -> float:
    """Resident set of the server's worker process, in MiB."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == server and b"app.worker" in (entry / "cmdline").read_bytes():
                return int((entry / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
        except OSError:
            continue
    raise RuntimeError("the worker is gone")


async def load(url: str, server: int, arguments: argparse.Namespace) -> Outcome:
    outcome, rng = Outcome(), random.Random(arguments.seed)
    weights = [1 / (rank + 1) ** arguments.skew for rank in range(arguments.tenants)]
    drawn = iter(rng.choices(range(arguments.tenants), weights, k=arguments.requests))
    finished = 0

    async def one(http: httpx.AsyncClient, tenant: int) -> None:
        kind = "update" if rng.random() < arguments.updates else "generate"
        body: dict[str, object] = {"tenant": f"t{tenant}"}
        if kind == "update":
            body["text"] = TEXT.format(rng.randrange(10**6))
        else:
            body |= {"prompt": "Mira Tolvan lives in", "max_tokens": arguments.tokens, "ignore_eos": True}
        began = time.perf_counter()
        try:
            response = await http.post(f"/{kind}", json=body)
        except httpx.HTTPError as error:
            outcome.errors[type(error).__name__] += 1
            return
        if response.status_code == 200:
            outcome.seconds[kind].append(time.perf_counter() - began)
        else:
            outcome.errors[str(response.status_code)] += 1

    async def user(http: httpx.AsyncClient) -> None:
        nonlocal finished
        for tenant in drawn:
            await one(http, tenant)
            finished += 1
            if finished % (arguments.requests // SAMPLES) == 0:
                outcome.rss.append(worker_rss(server))

    async with httpx.AsyncClient(base_url=url, timeout=120.0, trust_env=False) as http:
        for _ in range(600):
            if (await http.get("/ready")).status_code == 200:
                break
            await asyncio.sleep(0.1)
        outcome.rss.append(worker_rss(server))
        await asyncio.gather(*(user(http) for _ in range(arguments.users)))
        # the numbers come with the worker's next heartbeat
        await asyncio.sleep(2.5)
        outcome.metrics = (await http.get("/metrics")).text
    return outcome


def numbers(metrics: str, name: str) -> dict[str, float]:
    """A metric's values by its tier or direction."""
    found = re.findall(rf'^memoryllm_{name}{{(?:tier|direction)="(\w+)"}} (\S+)$', metrics, re.MULTILINE)
    return {label: float(value) for label, value in found}


def report(outcome: Outcome) -> None:
    hits = numbers(outcome.metrics, "memory_hits_total")
    table = Table("", "answered", "median ms", "p99 ms")
    for kind, seconds in outcome.seconds.items():
        if len(seconds) > 1:
            p99 = statistics.quantiles(seconds, n=100)[98]
            table.add_row(
                kind, str(len(seconds)), f"{1e3 * statistics.median(seconds):.1f}", f"{1e3 * p99:.1f}"
            )
    Console().print(table)
    print("errors:", dict(outcome.errors) or 0)
    total = sum(hits.values()) or 1
    print("found:", ", ".join(f"{tier} {share / total:.1%}" for tier, share in hits.items()))
    for name in ("memory_loads_total", "memory_evictions_total", "memory_moved_bytes_total", "memories"):
        print(f"{name}:", ", ".join(f"{k} {v:.0f}" for k, v in numbers(outcome.metrics, name).items()))
    print("worker MiB, at the start and after each eighth:", " ".join(f"{mib:.0f}" for mib in outcome.rss))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--tenants", type=int, default=10_000)
    parser.add_argument("--slots", type=int, default=16, help="pools that fit into the resident budget")
    parser.add_argument("--warm", type=int, default=64, help="copies that fit into the warm budget")
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--users", type=int, default=8, help="requests at once")
    parser.add_argument("--updates", type=float, default=0.2, help="share of requests that are updates")
    parser.add_argument("--tokens", type=int, default=8, help="tokens of a generation")
    parser.add_argument("--skew", type=float, default=0.8, help="the Zipf law's exponent")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.slots < 8 or arguments.requests < SAMPLES:
        parser.error(f"--slots and --requests are at least 8 and {SAMPLES}")
    directory = resolve(arguments.model)
    config = read_config(directory)
    weights, fingerprint = load_weights(directory, config)
    backbone = Backbone(config, weights, 16)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "store"
        make_store(root, arguments.tenants, fingerprint)
        resident = budget(backbone, arguments.slots)
        server, url = start(root, arguments.model, resident, arguments.warm * Arena.bytes_per_pool(backbone))
        try:
            outcome = asyncio.run(load(url, server.pid, arguments))
        finally:
            server.terminate()
            server.wait(60)
    report(outcome)
    print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    return 1 if outcome.errors else 0


if __name__ == "__main__":
    sys.exit(main())
