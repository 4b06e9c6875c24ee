"""Export and import through the engine: the same memory elsewhere, and files that are none."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from app.errors import FULL_SECONDS
from app.memory.codec import Pool, decode_block, encode_snapshot
from app.memory.file import MOST_HEADER, most_bytes
from app.memory.replay import replay
from app.messages import (
    Erased,
    EraseTenant,
    Exported,
    ExportTenant,
    Failed,
    GetHistory,
    GetMemory,
    History,
    ImportTenant,
    Reply,
    RollbackTenant,
    TenantInfo,
)
from app.model.backbone import Backbone
from app.store.base import BlobRef
from app.store.reading import BlobReader
from tests.fakes import MemoryStore
from tests.harness import NAMES, Harness, load_backbone
from tests.worker.test_memories import PROMPT, begin, pool, reply, same, text


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone("two-adapters")[0]


@pytest.fixture
def harness(backbone: Backbone) -> Harness:
    return Harness(backbone)


@pytest.fixture
def spooled(tmp_path: Path) -> Path:
    """A file as the API makes it."""
    path = tmp_path / "file"
    path.touch(mode=0o600)
    return path


def export(harness: Harness, tenant: str, path: Path, *, texts: bool = False) -> Path:
    told = reply(harness, ExportTenant, tenant, str(path), texts)
    assert isinstance(told, Exported), told
    assert told.bytes == path.stat().st_size <= most_bytes(harness.engine.backbone.config)
    return path


def test_another_models_memory_is_neither_exported_nor_looked_into(backbone: Backbone, spooled: Path) -> None:
    store = MemoryStore()
    Harness(backbone, "one", store=store).update("ada", text())
    harness = Harness(backbone, "two", store=store)
    for refused in (reply(harness, ExportTenant, "ada", str(spooled)), reply(harness, GetMemory, "ada")):
        assert isinstance(refused, Failed)
        assert refused.code == "model_mismatch"
    assert spooled.read_bytes() == b""


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("updates", [0, 1, 9])
def test_an_imported_memory_goes_on_as_the_exported_one(name: str, updates: int, spooled: Path) -> None:
    backbone = load_backbone(name)[0]
    config = backbone.config
    here, there = Harness(backbone), Harness(backbone)
    reply(here, EraseTenant, "ada")
    for _ in range(updates):
        here.update("ada", text(max(20, config.num_tokens)))
    here.generate("ada", PROMPT)
    export(here, "ada", spooled)
    info = reply(there, ImportTenant, "bob", str(spooled))
    assert isinstance(info, TenantInfo), info
    seed = here.store.load("ada").seed  # type: ignore[union-attr]
    assert (info.tenant, info.seed, info.memory_version) == ("bob", seed, updates)
    assert torch.equal(pool(here, "ada").hidden, pool(there, "bob").hidden)
    assert there.generate("bob", PROMPT) == here.generate("ada", PROMPT)
    more = text(max(20, config.num_tokens))
    for harness, tenant in ((here, "ada"), (there, "bob")):
        assert harness.update(tenant, more).memory_version == updates + 1
    a, b = pool(here, "ada"), pool(there, "bob")
    assert torch.equal(a.hidden, b.hidden)
    assert torch.equal(a.born, b.born)
    assert there.generate("bob", PROMPT) == here.generate("ada", PROMPT)


def test_the_file_is_the_references_layout(harness: Harness, spooled: Path) -> None:
    for _ in range(3):
        harness.update("ada", text())
    export(harness, "ada", spooled)
    config = harness.engine.backbone.config
    tensors = load_file(spooled)
    assert set(tensors) == {"memory", "born", "initialized"}
    assert torch.equal(tensors["memory"], pool(harness, "ada").hidden)
    assert torch.equal(tensors["born"], pool(harness, "ada").born)
    assert tensors["initialized"].dtype == torch.uint8
    assert tensors["initialized"].shape == ()
    assert int(tensors["initialized"]) == 1
    with safe_open(spooled, "pt") as file:
        metadata = file.metadata()
    exported = metadata.pop("exported")
    assert float(exported) > 1e9
    assert metadata == {
        "format": "pt",
        "memoryllm": "1",
        "fingerprint": "test",
        "seed": str(harness.store.load("ada").seed),  # type: ignore[union-attr]
        "memory_version": "3",
        "num_blocks": str(config.num_blocks),
        "num_tokens": str(config.num_tokens),
    }


def test_texts_and_keys_travel_only_if_asked(harness: Harness, spooled: Path) -> None:
    from app.messages import Context, Update

    request_id = harness.id()
    tokens = text()
    harness.send(Update(request_id, "ada", [Context(tokens, "Maya lives in Lisbon.")], "key"))
    harness.run()
    harness.update("ada", text())
    export(harness, "ada", spooled)
    assert b"Lisbon" not in spooled.read_bytes()
    assert reply(harness, ImportTenant, "silent", str(spooled)).memory_version == 2
    assert reply(harness, GetHistory, "silent").updates == []
    spooled.write_bytes(b"")
    export(harness, "ada", spooled, texts=True)
    assert b"Lisbon" in spooled.read_bytes()
    assert reply(harness, ImportTenant, "bob", str(spooled)).memory_version == 2
    histories = [reply(harness, GetHistory, name) for name in ("ada", "bob")]
    assert all(isinstance(history, History) for history in histories)
    assert histories[0].updates == histories[1].updates
    assert histories[1].updates[1].text == "Maya lives in Lisbon."
    again = harness.id()
    harness.send(Update(again, "bob", [Context(tokens)], "key"))
    harness.run()
    assert harness.final(again).replayed  # type: ignore[union-attr]
    assert same(harness, "ada", "bob")


def test_a_rolled_back_memory_is_exported_as_it_is_now(harness: Harness, spooled: Path) -> None:
    for _ in range(3):
        harness.update("ada", text())
    reply(harness, RollbackTenant, "ada", 1)
    export(harness, "ada", spooled, texts=True)
    assert reply(harness, ImportTenant, "bob", str(spooled)).memory_version == 1
    assert same(harness, "ada", "bob")


def test_a_memory_larger_than_the_tenant_s_limit_is_not_imported(harness: Harness, spooled: Path) -> None:
    harness.update("ada", text())
    export(harness, "ada", spooled)
    failed = reply(harness, ImportTenant, "bob", str(spooled), 1000)
    assert isinstance(failed, Failed)
    assert failed.code == "quota_exceeded"
    assert harness.store.load("bob") is None
    assert isinstance(reply(harness, ImportTenant, "bob", str(spooled), 1 << 30), TenantInfo)


def test_what_is_imported_survives_a_restart(harness: Harness, spooled: Path) -> None:
    for _ in range(3):
        harness.update("ada", text())
    export(harness, "ada", spooled)
    reply(harness, ImportTenant, "bob", str(spooled))
    harness.update("bob", more := text())
    again = Harness(harness.engine.backbone, store=harness.store)
    harness.update("ada", more)
    assert again.generate("bob", PROMPT) == harness.generate("ada", PROMPT)


# ---------------------------------------------------------------- files that are none

Change = Callable[[dict[str, torch.Tensor], dict[str, str]], None]


def rewritten(path: Path, change: Change) -> None:
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    change(tensors, metadata)
    save_file(tensors, path, metadata)


def nan(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    tensors["memory"][-1, -1, -1] = torch.nan


def infinite(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    tensors["memory"][0, 0, 0] = -torch.inf


def fewer_layers(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    tensors["memory"] = tensors["memory"][1:].clone()


def flat(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    tensors["memory"] = tensors["memory"].reshape(-1)


def transposed(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    tensors["memory"] = tensors["memory"].transpose(1, 2).contiguous()


def double(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    tensors["memory"] = tensors["memory"].double()


def extra(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    tensors["bos_embedding"] = torch.zeros(4)


def missing(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    del tensors["born"]


def other_model(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    metadata["fingerprint"] = "secret"


def no_metadata(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    metadata.clear()


def unborn(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    tensors["born"][:, -1] = 4


def disordered(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    tensors["born"][0, 0] = 2


def negative(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    tensors["born"][:, 0] = -1


def too_many_of_one(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    tensors["born"][:] = 3


def uninitialized(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    tensors["initialized"] = torch.tensor(0, dtype=torch.uint8)


def not_a_flag(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    tensors["initialized"] = torch.tensor(2, dtype=torch.uint8)


def aged(tensors: dict[str, torch.Tensor], metadata: dict[str, str], version: int) -> None:
    """As if there had been so many updates."""
    tensors["born"][tensors["born"] == 3] = version
    metadata["memory_version"] = str(version)


def says(**told: str) -> Change:
    def change(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        metadata.update(told)

    return change


def history(*versions: int, **fields: Any) -> Change:
    record = {"time": 1.0, "tokens": 20} | fields
    return says(history=json.dumps([{"version": version} | record for version in versions]))


def mark(**fields: Any) -> Change:
    return history(3, idempotency={"key": "k", "index": 0, "total": 1, "digest": "d"} | fields)


@pytest.mark.parametrize(
    "change",
    [
        nan,
        infinite,
        fewer_layers,
        flat,
        transposed,
        double,
        extra,
        missing,
        other_model,
        no_metadata,
        unborn,
        disordered,
        negative,
        too_many_of_one,
        uninitialized,
        not_a_flag,
        says(memory_version="2"),
        says(memory_version="0"),
        says(memory_version="-1"),
        says(memory_version="9" * 30),
        lambda tensors, metadata: aged(tensors, metadata, 2**30 + 1),
        lambda tensors, metadata: aged(tensors, metadata, 2**31 - 1),
        says(memory_version="³"),
        says(seed="1099511627776"),
        says(seed="1.5"),
        says(seed=""),
        says(memoryllm="2"),
        says(history="["),
        says(history="[]"),
        says(history="[" * 5000),
        history(1, 3),
        history(2, 1, 3),
        history(3, 4),
        history(0, 1, 2, 3),
        history(2),
        history(3, tokens=0),
        history(3, tokens="20"),
        history(3, time=None),
        mark(index=1),
        mark(index=-1),
        mark(key=""),
        mark(key="k" * 257),
    ],
)
def test_a_changed_file_is_refused_and_nothing_is_made(
    harness: Harness, spooled: Path, change: Change
) -> None:
    for _ in range(3):
        harness.update("ada", text())
    export(harness, "ada", spooled)
    before, stored = harness.store.load("ada"), dict(harness.store.blobs)  # type: ignore[attr-defined]
    rewritten(spooled, lambda tensors, metadata: None)
    info = reply(harness, ImportTenant, "control", str(spooled))
    assert isinstance(info, TenantInfo), "the unchanged file must be good"
    assert isinstance(reply(harness, EraseTenant, "control"), Erased)
    rewritten(spooled, change)
    failed = reply(harness, ImportTenant, "bob", str(spooled))
    assert isinstance(failed, Failed)
    assert failed.code == ("model_mismatch" if change is other_model else "invalid_memory_file")
    assert "secret" not in failed.message
    assert list(harness.store.tenants()) == ["ada"]
    assert harness.store.load("ada") == before
    assert harness.store.blobs == stored  # type: ignore[attr-defined]


def test_a_memory_of_the_most_updates_that_may_come_goes_on(harness: Harness, spooled: Path) -> None:
    for _ in range(3):
        harness.update("ada", text())
    export(harness, "ada", spooled)
    rewritten(spooled, lambda tensors, metadata: aged(tensors, metadata, 2**30))
    assert reply(harness, ImportTenant, "bob", str(spooled)).memory_version == 2**30
    assert harness.update("bob", text()).memory_version == 2**30 + 1
    # counting what is left of each is a matter of the pool's size, not of the version
    assert [update.surviving_share for update in reply(harness, GetHistory, "bob").updates] == [1.0]
    again = Harness(harness.engine.backbone, store=harness.store)
    assert again.generate("bob", PROMPT) == harness.generate("bob", PROMPT)


def header_of(raw: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def with_header(header: Any, data: bytes) -> bytes:
    encoded = json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + data


def test_a_hostile_header_is_refused(harness: Harness, spooled: Path) -> None:
    harness.update("ada", text())
    good = export(harness, "ada", spooled).read_bytes()
    header, data = header_of(good)
    memory = header["memory"]
    begin_at, end_at = memory["data_offsets"]
    width, born_end = end_at - begin_at, header["born"]["data_offsets"][1]
    hostile: list[bytes] = [
        b"",
        b"\0" * 7,
        b"\0" * 8,
        b"PK\x03\x04" + bytes(100),
        (2**63).to_bytes(8, "little") + good[8:],
        (MOST_HEADER + 1).to_bytes(8, "little") + good[8:],
        (len(good)).to_bytes(8, "little") + good[8:],
        good[:8] + b"\xff" * 20 + good[28:],
        *(good[:cut] for cut in (9, 100, len(good) // 2, len(good) - 1)),
        good + b"\0",
        with_header([], data),
        with_header({**header, "memory": {**memory, "data_offsets": [begin_at + 1, end_at + 1]}}, data),
        with_header({**header, "memory": {**memory, "data_offsets": [-width, 0]}}, data),
        with_header({**header, "memory": {**memory, "data_offsets": [end_at, begin_at]}}, data),
        with_header({**header, "memory": {**memory, "data_offsets": [2**70, 2**70 + width]}}, data),
        with_header({**header, "memory": {**memory, "data_offsets": [0.5, 1]}}, data),
        with_header({**header, "memory": {**memory, "shape": [2**40, 2**40, 2**40]}}, data),
        with_header({**header, "memory": {**memory, "shape": [-n for n in memory["shape"]]}}, data),
        with_header({**header, "memory": {**memory, "dtype": "I8"}}, data),
        with_header({**header, "memory": {**memory, "more": 1}}, data),
        with_header({**header, "empty": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}, data),
        # no gap and no overlap, and yet one takes of the other
        with_header(
            {
                **header,
                "born": {**header["born"], "data_offsets": [end_at, born_end - 4]},
                "initialized": {**header["initialized"], "data_offsets": [born_end - 4, born_end + 1]},
            },
            data,
        ),
        with_header({**header, "__metadata__": {**header["__metadata__"], "seed": 1}}, data),
        # the same bytes twice: born and initialized inside of memory
        with_header(
            {
                **header,
                "born": {**header["born"], "data_offsets": [0, width // 64]},
                "initialized": {**header["initialized"], "data_offsets": [0, 1]},
            },
            data,
        ),
        b"".join([(40_000).to_bytes(8, "little"), b'{"a":' * 8000, data]),
    ]
    for number, raw in enumerate(hostile):
        spooled.write_bytes(raw)
        failed = reply(harness, ImportTenant, "bob", str(spooled))
        assert isinstance(failed, Failed), number
        assert failed.code == "invalid_memory_file", (number, failed)
    assert list(harness.store.tenants()) == ["ada"]
    spooled.write_bytes(with_header(header, data))
    assert isinstance(reply(harness, ImportTenant, "bob", str(spooled)), TenantInfo)


def test_version_0_must_be_the_models_own_pool(harness: Harness, spooled: Path) -> None:
    harness.generate("ada", PROMPT)
    export(harness, "ada", spooled)
    assert reply(harness, ImportTenant, "good", str(spooled)).memory_version == 0

    def bent(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        tensors["memory"][0, 0, 0] += 1

    rewritten(spooled, bent)
    assert reply(harness, ImportTenant, "bob", str(spooled)).code == "invalid_memory_file"


@pytest.mark.parametrize(
    ("made", "served"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]
)
@pytest.mark.parametrize("updates", [0, 2])
def test_between_dtypes(made: torch.dtype, served: torch.dtype, updates: int, spooled: Path) -> None:
    here, there = (Harness(load_backbone("two-adapters", dtype)[0]) for dtype in (made, served))
    for _ in range(updates):
        here.update("ada", text())
    here.generate("ada", PROMPT)
    export(here, "ada", spooled)
    assert reply(there, ImportTenant, "bob", str(spooled)).memory_version == updates
    assert pool(there, "bob").hidden.dtype == served
    there.update("bob", text())


def test_a_number_too_large_for_the_servers_dtype(harness: Harness, spooled: Path) -> None:
    harness.update("ada", text())
    export(harness, "ada", spooled)

    def large(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        tensors["memory"][0, 0, 0] = torch.finfo(torch.float32).max

    rewritten(spooled, large)
    there = Harness(load_backbone("two-adapters", torch.bfloat16)[0])
    assert reply(there, ImportTenant, "bob", str(spooled)).code == "invalid_memory_file"
    assert list(there.store.tenants()) == []


# ---------------------------------------------------------------- beside others


class Piecemeal(MemoryStore):
    """Gives blobs in pieces alone, and compacts once somebody who has its manifest asks for the first."""

    def read(self, tenant: str, blob: BlobRef) -> bytes:
        raise AssertionError("all of a blob at once")

    def reader(self, tenant: str, blob: BlobRef) -> BlobReader:
        manifest = self.manifests[tenant]
        if manifest.snapshot is None:
            blocks = [(b.version, decode_block(self.blobs[b.blob.name])) for b in manifest.blocks]
            self.compact(tenant, manifest.version, encode_snapshot(replay(self.own_pool, blocks)))
        return super().reader(tenant, blob)

    own_pool: Pool


def test_a_compaction_disturbs_neither_an_export_nor_a_look(backbone: Backbone, spooled: Path) -> None:
    here = Harness(backbone)
    for _ in range(3):
        here.update("ada", text())
    view, expected = reply(here, GetMemory, "ada"), pool(here, "ada")
    for look in (True, False):
        store = Piecemeal()
        store.manifests, store.blobs = dict(here.store.manifests), dict(here.store.blobs)  # type: ignore[attr-defined]
        cold = Harness(backbone, store=store)
        store.own_pool = cold.engine.residency.own_pool
        if look:
            assert reply(cold, GetMemory, "ada") == view
        else:
            export(cold, "ada", spooled)
            assert torch.equal(load_file(spooled)["memory"], expected.hidden)
        assert store.manifests["ada"].snapshot is not None


def test_an_existing_tenant_is_not_touched_by_an_import(harness: Harness, spooled: Path) -> None:
    harness.update("ada", text())
    export(harness, "ada", spooled)
    harness.update("bob", text())
    before = harness.store.load("bob")
    assert reply(harness, ImportTenant, "bob", str(spooled)).code == "tenant_exists"
    assert harness.store.load("bob") == before
    assert reply(harness, ExportTenant, "nobody", str(spooled)).code == "tenant_not_found"


def test_an_erasure_ends_transfers(harness: Harness, spooled: Path, tmp_path: Path) -> None:
    for _ in range(2):
        harness.update("ada", text())
    export(harness, "ada", spooled)
    size = spooled.stat().st_size
    out = tmp_path / "out"
    out.touch()
    leaving = begin(harness, ExportTenant, "ada", str(out))
    coming = begin(harness, ImportTenant, "bob", str(spooled))
    erasures = [begin(harness, EraseTenant, name) for name in ("ada", "bob")]
    harness.run()
    assert harness.failure(leaving).code == harness.failure(coming).code == "tenant_erased"
    assert out.stat().st_size < size, "written on after the erasure"
    receipt = harness.final(erasures[0])
    assert isinstance(receipt, Reply)
    assert isinstance(receipt.body, Erased)
    assert receipt.body.cancelled == 1
    assert list(harness.store.tenants()) == []


def test_an_export_that_nobody_waits_for_ends(harness: Harness, spooled: Path) -> None:
    harness.update("ada", text())
    spooled.unlink()
    assert reply(harness, ExportTenant, "ada", str(spooled)).code == "internal_error"
    assert not spooled.exists()


def test_a_full_disk_is_told_as_such(
    harness: Harness, spooled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **more: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    harness.update("ada", text())
    monkeypatch.setattr("app.worker.transfers.write_memory", full)
    failed = reply(harness, ExportTenant, "ada", str(spooled))
    assert (failed.code, "spool" in failed.message) == ("store_full", True)
    assert failed.retry_after == FULL_SECONDS
