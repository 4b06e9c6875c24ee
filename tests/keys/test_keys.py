"""Keys, their file, and the eye that is kept on it."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from structlog.testing import capture_logs

from app.keys import watch
from app.keys.file import BadKeysFile, read, write
from app.keys.ring import Limits, Ring, make
from app.keys.watch import WatchedRing


def test_a_key_has_256_bits_and_its_entry_has_only_their_hash() -> None:
    keys = [make(tenants=["ada"]) for _ in range(50)]
    assert len({key for key, _ in keys}) == 50
    for key, entry in keys:
        secret = key.split("-", 2)[2]
        assert len(secret) == 43  # 32 bytes in base64
        assert entry.digest == hashlib.sha256(secret.encode()).hexdigest()
        assert secret not in repr(entry)
        assert Ring([entry]).find(key) == entry


def test_what_is_no_key_is_not_found() -> None:
    (key, entry), (other, another) = make(tenants=["ada"]), make(tenants=["bob"])
    ring = Ring([entry, another])
    id, secret = key.split("-", 2)[1:]
    wrong = [
        "", " ", secret, f"mllm-{id}-", f"mllm-{id}-{secret[:-1]}", f"{key} ", f" {key}", key.upper(),
        f"mllm-{id}-{other.split('-', 2)[2]}", f"mllm-{'0' * 12}-{secret}", f"{key}\n", key + "a",
    ]  # fmt: skip
    assert [ring.find(each) for each in wrong] == [None] * len(wrong)
    assert ring.find(other) == another


def test_secrets_are_compared_in_constant_time_for_known_and_unknown_ids() -> None:
    key, entry = make(tenants=["ada"])
    unknown = "mllm-000000000000-" + key.split("-", 2)[2]
    with mock.patch.object(hmac, "compare_digest", wraps=hmac.compare_digest) as compared:
        Ring([entry]).find(key)
        Ring([entry]).find(unknown)
    assert compared.call_count == 2
    assert all(len(a) == len(b) == 64 for a, b in (call.args for call in compared.call_args_list))


@pytest.mark.parametrize(
    ("bounds", "tenant", "may"),
    [
        (["ada"], "ada", True),
        (["ada"], "adam", False),
        (["ada"], "Ada", False),
        (["acme/*"], "acme/x", True),
        (["acme/*"], "acme", False),
        (["acme/*"], "acme2/x", False),
        (["ada", "bob"], "bob", True),
        (["a*b"], "axb", False),
    ],
)
def test_bounds(bounds: list[str], tenant: str, may: bool) -> None:
    assert make(tenants=bounds)[1].may(tenant) == may


def test_the_one_tenant_of_a_key() -> None:
    assert make(tenants=["ada"])[1].own == "ada"
    assert make(tenants=["a*"])[1].own is None
    assert make(tenants=["ada", "bob"])[1].own is None
    assert make(admin=True)[1].own is None
    assert make(admin=True)[1].may("anyone")


def test_limits_over_those_of_the_server() -> None:
    assert Limits(5, 0, 2).over(Limits(9, 8, 7, 6)) == Limits(5, 8, 2, 6)


# ---------------------------------------------------------------- the file


def test_the_file_there_and_back(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    entries = [make(tenants=["ada"], name="a note", limits=Limits(1, 2, 3))[1], make(admin=True)[1]]
    write(path, entries)
    assert list(read(path).keys) == entries
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_owner_and_group_of_the_file_stay(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    write(path, [])
    for mode, kept in ((0o640, 0o640), (0o600, 0o600), (0o666, 0o640)):
        path.chmod(mode)
        with mock.patch.object(os, "fchown") as chown:
            write(path, [make(admin=True)[1]])
        assert path.stat().st_mode & 0o777 == kept
        assert chown.call_args.args[1:] == (path.stat().st_uid, path.stat().st_gid)
    # who may not give the file back to its owner must not take it from the server
    before = path.read_bytes()
    refused = mock.patch.object(os, "fchown", side_effect=PermissionError(1, "no"))
    with refused, pytest.raises(PermissionError):
        write(path, [])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    write(path, [])
    before = path.read_bytes()
    with mock.patch.object(os, "fsync", side_effect=OSError(5, "no")), pytest.raises(OSError, match="no"):
        write(path, [make(admin=True)[1]])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def entry(**changes: Any) -> dict[str, Any]:
    return {"id": "0" * 12, "digest": "0" * 64, "created": 0.0, "tenants": ["ada"]} | changes


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"\xff",
        {"format": 2, "keys": []},
        {"format": 1, "keys": [entry(), entry()]},
        {"format": 1, "keys": [entry(id="../x")]},
        {"format": 1, "keys": [entry(digest="")]},
        {"format": 1, "keys": [entry(tenants=[])]},
        {"format": 1, "keys": [entry(tenants=[""])]},
        {"format": 1, "keys": [entry(admin="yes")]},
        {"format": 1, "keys": [entry(limits={"bytes": -1})]},
        {"format": 1, "keys": [entry(limits={"bytes": 2**63})]},
        b'{"format": 1, "keys": [{"other": ' + b"[" * 100_000,
        {"format": 1, "keys": [], "more": 1},
    ],
    ids=str,
)
def test_damaged_files(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "keys.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    path.chmod(0o600)
    with pytest.raises(BadKeysFile, match="damaged"):
        read(path)


def test_a_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    write(path, [])
    for mode in (0o604, 0o620, 0o666):
        path.chmod(mode)
        with pytest.raises(BadKeysFile, match="chmod 600"):
            read(path)
    with pytest.raises(BadKeysFile, match="cannot be read"):
        read(tmp_path / "absent")


@pytest.mark.usefixtures("all_logs")
def test_changes_are_seen_and_a_bad_file_leaves_the_last_good_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "_LOOK_EVERY", 0.0)
    path = tmp_path / "keys.json"
    (first, one), (second, two) = make(tenants=["ada"]), make(tenants=["bob"])
    write(path, [one])
    ring = WatchedRing(path)
    assert ring.ring.find(first)
    with capture_logs() as logs:
        write(path, [two])
        assert ring.ring.find(first) is None
        assert ring.ring.find(second)
        for break_it in (lambda: path.write_text("{"), path.unlink):
            break_it()
            assert ring.ring.find(second)
            assert ring.ring.find(second)
        write(path, [one, two])
        assert ring.ring.find(first)
    # each change is told of once
    assert [line["log_level"] for line in logs] == ["info", "error", "error", "info"]
    with pytest.raises(BadKeysFile):
        WatchedRing(tmp_path / "absent")


@pytest.mark.usefixtures("all_logs")
def test_a_file_that_was_open_to_others_counts_once_it_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "_LOOK_EVERY", 0.0)
    path = tmp_path / "keys.json"
    (first, one), (second, two) = make(tenants=["ada"]), make(tenants=["bob"])
    write(path, [one])
    ring = WatchedRing(path)
    write(path, [two])
    path.chmod(0o644)
    with capture_logs() as logs:
        assert ring.ring.find(first)
        path.chmod(0o600)
        assert ring.ring.find(first) is None
        assert ring.ring.find(second)
        # the kernel's clock of changes is a coarse one
        time.sleep(0.05)
        path.chmod(0o644)
        assert ring.ring.find(second)
    assert [line["log_level"] for line in logs] == ["error", "info", "error"]


@pytest.mark.usefixtures("all_logs")
def test_a_revoked_key_does_not_live_on_a_read_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "_LOOK_EVERY", 0.0)
    path = tmp_path / "keys.json"
    key, entry = make(tenants=["ada"])
    write(path, [entry])
    ring = WatchedRing(path)
    write(path, [])
    with capture_logs() as logs, mock.patch.object(watch, "read", side_effect=BadKeysFile("no descriptors")):
        assert ring.ring.find(key)
        assert ring.ring.find(key)
    assert len(logs) == 1
    assert ring.ring.find(key) is None
