"""The real disk's calls, as far as the stores' own tests do not meet them: files so large that several threads read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from app.store import files
from app.store.files import Disk


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    monkeypatch.setattr(files, "_LARGE", 100)
    monkeypatch.setattr(files, "_LARGE_PART", 10)
    return Disk()


@pytest.mark.parametrize("size", [100, 101, 105, 1000])
@pytest.mark.parametrize("missing", [0, 1, 7, 50, 100])
def test_a_large_file_is_read_in_order_as_far_as_it_goes(
    disk: Disk, tmp_path: Path, size: int, missing: int
) -> None:
    data = os.urandom(size)
    (tmp_path / "file").write_bytes(data[: size - missing])
    buffer, seen = memoryview(bytearray(size)), bytearray()
    assert disk.read_into(tmp_path / "file", buffer, seen.extend) == size - missing
    assert seen == buffer[: size - missing] == data[: size - missing]


def test_a_file_that_cannot_be_read_is_said_so_once_nobody_reads_it(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(bytes(1000))
    read, reading = files._read_at, set[int]()

    def failing(descriptor: int, part: memoryview, offset: int) -> int:
        reading.add(offset)
        try:
            if offset == 40:
                raise OSError("the disk is broken")
            return read(descriptor, part, offset)
        finally:
            reading.discard(offset)

    monkeypatch.setattr(files, "_read_at", failing)
    seen = bytearray()
    with pytest.raises(OSError, match="broken"):
        disk.read_into(tmp_path / "file", memoryview(bytearray(1000)), seen.extend)
    assert len(seen) == 40
    assert not reading
