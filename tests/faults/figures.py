"""What durability costs: starting with many tenants, loading a cold one, a durable update, bytes on the disk.

Each time stands beside what the disk itself takes for the same bytes, measured in turn with it.
"""

from __future__ import annotations

import gc
import os
import random
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch

from app.memory.codec import Block, Pool, encode_block, encode_snapshot
from app.memory.lanes import lanes_of
from app.memory.loader import Loader
from app.memory.source import default_seed
from app.messages import Context, Update, Updated
from app.model.backbone import Backbone
from app.model.checkpoint import load_weights, resolve
from app.model.config import read_config
from app.model.forgetting import draw
from app.model.torch_operations import TorchOperations
from app.store.base import BlobRef, Manifest
from app.store.disk import DiskStore
from app.store.files import Disk, File
from app.store.home import tenant_id
from app.store.records import seal
from app.worker.updates import compaction_interval
from experiments.random_checkpoint import shape, write
from tests.fakes import MemoryStore
from tests.faults.servers import StartedServer
from tests.harness import Harness

_CHUNK = 1 << 20


class Hasty(Disk):
    """Syncs nothing: for making stores, and for what is not about time."""

    def create(self, path: Path) -> File:
        file = super().create(path)
        file.sync = lambda: None  # type: ignore[method-assign]
        return file

    def sync_directory(self, path: Path) -> None: ...


class Forgetful(MemoryStore):
    """Keeps blobs without hashing them, so that an update into it costs the model's own work and no more."""

    def _put(self, blob: bytes, version: int, kind: str) -> BlobRef:
        name = self._new_name(version, kind)
        self.blobs[name] = blob
        return BlobRef(name, len(blob), "")


def backbone_of(model: str) -> tuple[Backbone, str]:
    directory = resolve(model)
    config = read_config(directory)
    weights, fingerprint = load_weights(directory, config, dtype=torch.float32, device=torch.device("cpu"))
    return Backbone(config, weights, 256, TorchOperations), fingerprint


def files_of(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


def chill(paths: Sequence[Path]) -> None:
    """Has the system forget what it holds of these files; they are synced first, or it would keep them."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


# ---------------------------------------------------------------- restart


def make_tenants(root: Path, count: int) -> None:
    """Tenants of the pocket model, each with one block."""
    backbone, fingerprint = backbone_of("pocket")
    config = backbone.config
    hidden = torch.zeros(config.num_layers, config.num_tokens, config.hidden_size)
    store = DiskStore(root, files=Hasty())
    for number in range(count):
        name = f"tenant {number}"
        store.create(Manifest(name, default_seed(name), fingerprint, 0.0))
        forgotten = draw(
            default_seed(name),
            1,
            pool_size=config.pool_size,
            num_tokens=config.num_tokens,
            num_layers=config.num_layers,
            per_layer=config.drop_memory_per_layer,
        )
        store.commit(name, 0, encode_block(Block(hidden, forgotten)), time=0.0, tokens=16, text="a text")
    store.close()


def start_seconds(root: Path, *, cold: bool) -> float:
    """From the start of ``memoryllm serve`` until it says that it is ready."""
    if cold:
        chill(files_of(root))
    servers: list[StartedServer] = []

    def start() -> None:
        servers.append(StartedServer(store=f"disk://{root}", model="pocket"))
        servers[0].ready()

    try:
        return timed(start)
    finally:
        for server in servers:
            server.close()


def restart(directory: Path, count: int, times: int = 3) -> dict[str, float]:
    """Seconds (medians): with ``count`` tenants, warm and cold, and with a single one."""
    make_tenants(directory / "many", count)
    make_tenants(directory / "one", 1)
    chill(files_of(directory / "many"))
    found: dict[str, list[float]] = {"one": [], "warm": [], "cold": []}
    for _ in range(times):
        found["one"].append(start_seconds(directory / "one", cold=False))
        found["cold"].append(start_seconds(directory / "many", cold=True))
        found["warm"].append(start_seconds(directory / "many", cold=False))
    store = directory / "many"

    def open_store() -> None:
        DiskStore(store).close()

    opened = min(timed(open_store) for _ in range(times))
    return {name: median(seconds) for name, seconds in found.items()} | {"store": opened}


# ---------------------------------------------------------------- loading


def read_whole(paths: Sequence[Path], buffer: memoryview) -> None:
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def loading(directory: Path, blocks: int = 50, times: int = 5) -> dict[str, float]:
    """Bytes a second of a cold tenant's load, store alone and into its slot, and of the disk. 8 layers of width 512."""
    config = shape(
        layers=8,
        hidden=512,
        heads=8,
        kv_heads=2,
        intermediate=512,
        vocab=64,
        num_blocks=blocks,
        num_tokens=64,
    )
    write(directory / "model", config, 1)
    backbone, fingerprint = backbone_of(str(directory / "model"))
    store = DiskStore(directory / "store", files=Hasty())
    names = [f"tenant {number}" for number in range(times)]
    born = torch.zeros(1, config.pool_size, dtype=torch.int32)
    for name in names:
        pool = Pool(torch.randn(config.num_layers, config.pool_size, config.hidden_size), born)
        manifest = Manifest(name, default_seed(name), fingerprint, 0.0, version=1)
        store.create(manifest, encode_snapshot(pool))
        for version in range(2, 2 + blocks // 5):
            forgotten = draw(
                manifest.seed, version, pool_size=config.pool_size, num_tokens=config.num_tokens,
                num_layers=config.num_layers, per_layer=False,
            )  # fmt: skip
            hidden = torch.randn(config.num_layers, config.num_tokens, config.hidden_size)
            store.commit(name, version - 1, encode_block(Block(hidden, forgotten)), time=0.0, tokens=16)
    store.close()
    # or the disk would be at work with it while it is measured
    os.sync()
    store = DiskStore(directory / "store")
    harness = Harness(backbone, fingerprint, store=store, slots=2)
    residency = harness.engine.residency
    lanes = lanes_of(backbone.device, backbone.dtype)
    loader = Loader(residency.arena, residency, lanes)
    buffer = memoryview(bytearray(_CHUNK))
    rates: dict[str, list[float]] = {"disk": [], "store": [], "slot": []}
    for name in names:
        id = tenant_id(name)
        # before its files are listed: what was made ahead is swept
        manifest_now = store.load(name)
        assert manifest_now is not None
        paths = files_of(directory / "store" / "tenants" / id[:2] / id)
        size = sum(path.stat().st_size for path in paths)
        works: dict[str, Callable[[], object]] = {
            "disk": lambda paths=paths: read_whole(paths, buffer),  # type: ignore[misc]
            "store": lambda manifest=manifest_now: residency.pool(manifest),  # type: ignore[misc]
            "slot": lambda name=name: loader.load(name, 1, lanes.mark(), None, None),  # type: ignore[misc]
        }
        for kind, work in works.items():
            chill(paths)
            gc.collect()
            rates[kind].append(size / timed(work))
    store.close()
    return {kind: median(found) for kind, found in rates.items()} | {"bytes": float(size)}


# ---------------------------------------------------------------- updating


def two_syncs(directory: Path, number: int, blob: bytes, manifest: bytes) -> None:
    for name, data in (("blob", blob), ("manifest", manifest)):
        descriptor = os.open(directory / f"{number}.{name}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
        os.close(descriptor)


def updating(directory: Path, model: str, times: int = 150) -> dict[str, float]:
    """Seconds (medians) of an update kept durably, one kept in memory only, and two fsyncs of the same bytes."""
    torch.set_num_threads(1)
    backbone, fingerprint = backbone_of(model)
    store = DiskStore(directory / "store")
    durable = Harness(backbone, fingerprint, store=store, slots=1)
    fleeting = Harness(backbone, fingerprint, store=Forgetful(), slots=1)
    beside = directory / "beside"
    beside.mkdir()
    found: dict[str, list[float]] = {"durable": [], "memory": [], "syncs": []}
    rng = random.Random(1)
    for number in range(times):
        context = rng.choices(range(3, 60), k=32)
        compacts = number % backbone.config.num_blocks == backbone.config.num_blocks - 1
        # in turns the first, since the second finds the model's weights in the processor's caches
        seconds = {
            kind: timed(lambda kept=kept, context=context: kept.update("ada", context))  # type: ignore[misc]
            for kind, kept in [("durable", durable), ("memory", fleeting)][:: 1 - 2 * (number % 2)]
        }
        manifest = store.load("ada")
        assert manifest is not None
        if compacts or not manifest.blocks:
            continue
        blob, text = store.read("ada", manifest.blocks[-1].blob), seal(manifest)
        seconds["syncs"] = timed(
            lambda n=number, blob=blob, text=text: two_syncs(beside, n, blob, text)  # type: ignore[misc]
        )
        for kind, value in seconds.items():
            found[kind].append(value)
    store.close()
    shutil.rmtree(beside)
    return {kind: median(values) for kind, values in found.items()} | {"bytes": float(len(blob))}


# ---------------------------------------------------------------- bytes


def bytes_in_pools(directory: Path, updates: int, model: str = "pocket") -> dict[str, float]:
    """What a tenant takes on the disk after ``updates``, with texts and keys, in pools; and the most it ever took."""
    backbone, fingerprint = backbone_of(model)
    config = backbone.config
    pool = config.num_layers * config.pool_size * config.hidden_size * 4
    store = DiskStore(directory / "store", files=Hasty())
    interval = compaction_interval(config.num_blocks)
    harness = Harness(backbone, fingerprint, store=store, slots=1, compacted_after=interval)
    id = tenant_id("ada")
    home = directory / "store" / "tenants" / id[:2] / id
    rng = random.Random(1)
    most = last = 0
    for number in range(updates):
        context = Context(
            rng.choices(range(3, 60), k=48), text="a sentence of the length that they have. " * 5
        )
        request = harness.id()
        harness.send(Update(request, "ada", [context], f"key {number}"))
        harness.run()
        assert isinstance(harness.final(request), Updated)
        harness.answers.clear()
        last = sum(path.stat().st_blocks * 512 for path in files_of(home))
        most = max(most, last)
    store.close()
    return {"after": last / pool, "most": most / pool, "pool": float(pool)}
