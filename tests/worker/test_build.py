"""Budgets: what is allocated fits into what the operator gave, and what cannot fit is said at the start."""

from __future__ import annotations

import pytest
import torch

from app.memory.arena import Arena
from app.settings import Settings
from app.worker.build import CannotStart, cache_rows, pick_device, pick_dtype, pick_threads, slot_counts
from tests.harness import load_backbone


@pytest.fixture(scope="module")
def each() -> int:
    return Arena.bytes_per_pool(load_backbone("plain")[0])


@pytest.mark.parametrize("pools", [1.4, 2, 5.5, 11, 40, 1000])
def test_pools_and_copies_fit_into_the_budget(each: int, pools: float) -> None:
    backbone = load_backbone("plain")[0]
    budget = int(each * pools)
    slots, hot = slot_counts(backbone, budget)
    assert hot > slots >= 1
    assert 2 * slots * each // 3 + hot * each // 3 <= budget
    assert slots >= 0.7 * pools - 1


def test_the_arena_takes_what_was_counted(each: int) -> None:
    backbone = load_backbone("plain")[0]
    pools = Arena(backbone, 3, 3).pools
    assert pools.key.nbytes + pools.value.nbytes + pools.hot_key.nbytes == 3 * each


def test_a_budget_below_one_pool_is_refused(each: int) -> None:
    with pytest.raises(CannotStart, match="raise --resident-bytes"):
        slot_counts(load_backbone("plain")[0], each)


def test_cache_rows_are_bounded_by_memory_and_hold_one_sequence_at_least() -> None:
    backbone = load_backbone("plain")[0]
    settings = Settings(max_sequence=100, context_tokens=0)
    row = 2 * 3 * 2 * 16 * 4
    assert cache_rows(backbone, settings, 8 * row * 777) == 777
    assert cache_rows(backbone, settings, 0) == 100
    assert cache_rows(backbone, settings, 2**50) == 131_072
    assert cache_rows(backbone, Settings(context_tokens=500), 0) == 500


def test_devices_dtypes_and_threads() -> None:
    assert pick_dtype("auto", torch.device("cpu")) == torch.float32
    assert pick_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert pick_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16
    assert pick_device("cpu").type == "cpu"
    if not torch.cuda.is_available():
        with pytest.raises(CannotStart, match="no CUDA device"):
            pick_device("cuda")
    config = load_backbone("plain")[0].config
    assert pick_threads(0, config) == 1
    assert pick_threads(3, config) == 3
