"""Tests that need a GPU: ``make test-gpu``. They are skipped where there is none."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no GPU is here")
    return torch.device("cuda")
