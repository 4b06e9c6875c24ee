"""Some random scripts of a worker on a failing disk, and every seeded bug of the worker caught by them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.oracle import Oracle
from tests.faults.worker import WorkerBench
from tests.faults.worker_mutants import MUTANTS, caught
from tests.harness import load_backbone

# the scripts that find them are late, and there is no need to wait for them at every test
LATE = {
    "a failed commit is made again": 13,
    "readers of an older version are not awaited": 9,
    "a rollback leaves the warm copy, which is believed": 45,
}


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle(load_backbone("plain")[0])


def test_what_a_worker_acknowledges_is_there(oracle: Oracle, tmp_path: Path) -> None:
    bench = WorkerBench(oracle, tmp_path)
    for seed in range(8):
        bench.run(seed)
    assert bench.done.acknowledged > 40
    assert bench.done.crashes > 3
    assert bench.done.failures > 5


@pytest.mark.parametrize("name", MUTANTS)
def test_a_seeded_bug_is_caught(name: str, oracle: Oracle, tmp_path: Path) -> None:
    assert caught(name, oracle, tmp_path, LATE.get(name, 0)), "the bench of the worker does not find this bug"
