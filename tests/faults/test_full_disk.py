"""A disk that is really full."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.full_disk import fill, limited, small_disk


def test_a_full_tmpfs(tmp_path: Path) -> None:
    try:
        with small_disk(tmp_path):
            assert fill(tmp_path / "store") >= 20
    except PermissionError as error:
        pytest.skip(str(error))


def test_files_that_may_not_grow(tmp_path: Path) -> None:
    assert limited(tmp_path / "store") == 6
