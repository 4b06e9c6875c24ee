"""The benchmark says so where it cannot measure."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kernels.bench import main


def test_nothing_is_measured_without_a_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    table = tmp_path / "bench.csv"
    assert main(["--csv", str(table)]) == 2
    assert "nothing was measured" in capsys.readouterr().err
    assert not table.exists()
