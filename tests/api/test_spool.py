"""The files of transfers: few at once, private, and gone even when a server was killed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from app.api.spool import Spool
from app.errors import FULL_SECONDS, ServerBusy, StoreFull, TenantBusy, TenantErased


def test_there_are_only_so_many_transfers_at_once(tmp_path: Path) -> None:
    spool = Spool(tmp_path, most=2)
    with spool.file("a") as first, spool.file("b"):
        with pytest.raises(ServerBusy), spool.file("c"):
            pass
        assert first.path.stat().st_mode & 0o777 == 0o600
    with spool.file("c"):
        pass
    spool.close()
    assert list(tmp_path.iterdir()) == []


def test_one_who_has_half_of_the_places_leaves_the_others(tmp_path: Path) -> None:
    spool = Spool(tmp_path, most=4)
    with spool.file("a", "k1"), spool.file("b", "k1"):
        with pytest.raises(TenantBusy, match="this key") as refused, spool.file("c", "k1"):
            pass
        assert refused.value.retry_after is not None
        with spool.file("c", "k2"), spool.file("c"):
            pass
    with spool.file("a", "k1"), spool.file("a", "k2"):
        with pytest.raises(TenantBusy, match="this tenant"), spool.file("a"):
            pass
        with spool.file("b"):
            pass
    assert not spool._held
    spool.close()


CRASH = """
import os, sys
from pathlib import Path
from app.api.spool import Spool
spool = Spool(Path(sys.argv[1]), 2)
with spool.file("ada") as file:
    file.write(b"memory")
    os._exit(9)
"""


def test_a_killed_servers_files_are_removed_by_the_next(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", CRASH, str(tmp_path)], timeout=60, cwd=Path(__file__).parents[2]
    )
    assert ran.returncode == 9
    (dead,) = tmp_path.iterdir()
    assert len(list(dead.iterdir())) == 2
    living = Spool(tmp_path, 2)
    with living.file("bob") as file:
        (tmp_path / "memoryllm-spool-odd").mkdir()
        (tmp_path / "memoryllm-spool-link").symlink_to(dead)
        (tmp_path / "other").mkdir()
        assert Spool(tmp_path, 2).sweep() == 1
        assert not dead.exists()
        assert file.path.exists(), "a running server's file was taken away"
        assert (tmp_path / "other").exists()
    living.close()


def test_a_revoked_file_is_empty_and_tells_nobody(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 4)
    with spool.file("ada") as ada, spool.file("bob") as bob:
        for file in (ada, bob):
            file.write(b"memory")
        reader = bob.path.open("rb")
        descriptor = ada.path.open("rb")
        assert spool.revoke("ada") == 1
        assert not ada.path.exists()
        # whoever has it open finds nothing in it
        assert (descriptor.read(), reader.read()) == (b"", b"memory")
        for use in (ada.read, lambda: ada.write(b"more")):
            with pytest.raises(TenantErased):
                use()
        reader.close()
        descriptor.close()
    spool.close()


def test_a_directory_that_was_cleaned_away_is_made_again(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 1)
    with spool.file("ada"):
        pass
    (directory,) = tmp_path.iterdir()
    shutil.rmtree(directory)
    with spool.file("ada") as file:
        assert file.path.exists()
    spool.close()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 1)
    with spool.file("ada") as file:
        file._file.close()
        file._file = open("/dev/full", "r+b", buffering=0)  # noqa: SIM115
        with pytest.raises(StoreFull) as full:
            file.write(b"memory")
        assert full.value.retry_after == FULL_SECONDS
    spool.close()
