"""What the worker says of requests that fail for no fault of the caller's, and of compactions: code, reason, file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app import logs
from app.errors import StoreFailed, StoreFull, VersionConflict
from app.model.backbone import Backbone
from app.settings import Settings
from app.store.base import Manifest
from app.store.disk import DiskStore
from tests.fakes import MemoryStore
from tests.harness import Harness, load_backbone

TEXT = list(range(10, 50))
PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone("plain")[0]


@pytest.fixture(autouse=True)
def _quiet_again() -> Iterator[None]:
    yield
    logs.configure(Settings(log_level="error"))


def read(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    told = capsys.readouterr().err
    assert "adalovelace" not in told
    return [json.loads(line) for line in told.splitlines()]


def damaged_blob(root: Path) -> str:
    (path,) = [path for path in root.rglob("*.block") if path.stat().st_size]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return path.name


def missing_blob(root: Path) -> str:
    (path,) = [path for path in root.rglob("*.block") if path.stat().st_size]
    path.unlink()
    return path.name


def damaged_manifest(root: Path) -> str:
    (path,) = root.rglob("manifest")
    path.write_bytes(path.read_bytes()[:-1])
    return f"{path.parent.name}/{path.name}"


@pytest.mark.parametrize("damage", [damaged_blob, missing_blob, damaged_manifest])
def test_the_log_says_which_file_puts_a_tenant_into_quarantine(
    backbone: Backbone, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Any
) -> None:
    store = DiskStore(tmp_path)
    Harness(backbone, store=store).update("adalovelace", TEXT)
    store.close()
    name = damage(tmp_path)
    store = DiskStore(tmp_path)
    h = Harness(backbone, store=store)
    logs.configure(Settings(log_json=True))
    asked = h.begin_generate("adalovelace", PROMPT, 2)
    h.run()
    failure = h.failure(asked)
    store.close()
    assert failure.code == "tenant_quarantined"
    assert name not in failure.message
    (line,) = read(capsys)
    assert (line["event"], line["level"], line["job"]) == ("request failed", "warning", asked)
    assert (line["code"], line["reason"], line["file"]) == (failure.code, failure.message, name)


class Failing(MemoryStore):
    """Fails ``commit`` and ``compact`` with these."""

    commits: Exception | None = None
    compactions: Exception | None = None

    def commit(self, *arguments: Any, **rest: Any) -> Manifest:
        if self.commits is not None:
            raise self.commits
        return super().commit(*arguments, **rest)

    def compact(self, *arguments: Any, **rest: Any) -> Manifest:
        if self.compactions is not None:
            raise self.compactions
        return super().compact(*arguments, **rest)


def test_what_the_server_cannot_do_is_told_and_what_a_client_does_wrong_is_not(
    backbone: Backbone, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Failing()
    h = Harness(backbone, store=store)
    h.update("adalovelace", TEXT, key="k")
    logs.configure(Settings(log_json=True))
    h.begin_update("adalovelace", TEXT[::-1], key="k")
    h.begin_generate("adalovelace", [])
    h.run()
    assert read(capsys) == []
    store.commits = StoreFull("the disk is full")
    failed = h.begin_update("adalovelace", TEXT)
    h.run()
    (line,) = read(capsys)
    assert (line["job"], line["code"], line["reason"]) == (failed, "store_full", "the disk is full")


@pytest.mark.parametrize(
    ("error", "level"),
    [
        (StoreFailed("writing a snapshot failed: EIO"), "warning"),
        (VersionConflict("the memory has changed meanwhile"), "info"),
    ],
)
def test_a_compaction_that_fails_is_told_and_counted_and_tried_again(
    backbone: Backbone, capsys: pytest.CaptureFixture[str], error: StoreFailed | VersionConflict, level: str
) -> None:
    store = Failing()
    h = Harness(backbone, store=store, compacted_after=2)
    counted = f"store_compactions_failed_total:{error.code}"
    store.compactions = error
    logs.configure(Settings(log_json=True))
    h.update("adalovelace", TEXT)
    assert not h.engine.stats().counters.get(counted)
    for version in (2, 3):
        assert h.update("adalovelace", TEXT).memory_version == version
    lines = read(capsys)
    assert [(line["event"], line["level"], line["version"]) for line in lines] == [
        ("compaction failed", level, 2),
        ("compaction failed", level, 3),
    ]
    assert {(line["code"], line["reason"]) for line in lines} == {(error.code, error.message)}
    assert h.engine.stats().counters[counted] == 2
    store.compactions = None
    h.update("adalovelace", TEXT)
    assert h.engine.stats().counters["store_compactions_total"] == 1
    assert read(capsys) == []
