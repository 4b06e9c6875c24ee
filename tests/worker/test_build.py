"""Budgets: what is allocated fits into what the operator gave, and what cannot fit is said at the start."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from app.memory.arena import Arena
from app.model.backbone import Backbone
from app.model.checkpoint import CheckpointError
from app.model.pools import PoolForm
from app.model.torch_operations import TorchOperations
from app.settings import Settings
from app.worker.budget import (
    CannotStart,
    beside_others,
    by_running,
    cache_rows,
    left_to_container,
    load_bytes,
    reserve,
    row_bytes,
    share_out,
    unbuilt,
    update_bytes,
    updates_at_once,
)
from app.worker.build import build, pick_device, pick_dtype, pick_threads, served_name
from tests.fakes import MemoryStore
from tests.harness import CHECKPOINTS, load_backbone


@pytest.fixture(scope="module")
def plain() -> Backbone:
    return load_backbone("plain")[0]


def used(backbone: Backbone, slots: int, hot: int) -> int:
    return slots * Arena.bytes_per_pool(backbone) + hot * Arena.bytes_per_copy(backbone)


def test_a_tokenizer_that_cannot_be_read_is_refused_before_the_weights_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_weights(*_: object, **__: object) -> None:
        pytest.fail("the weights were read")

    monkeypatch.setattr("app.worker.build.load_weights", load_weights)
    shutil.copy(CHECKPOINTS / "plain" / "config.json", tmp_path)
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        build(Settings(model=str(tmp_path)), MemoryStore(), lambda work, done: None)


@pytest.mark.parametrize("pools", [1.7, 2, 5.5, 11, 40, 1000])
def test_pools_and_copies_fit_into_the_budget(plain: Backbone, pools: float) -> None:
    budget = int(pools * used(plain, 1, 1))
    slots, hot = beside_others(plain, budget)
    assert hot > slots >= 1
    assert used(plain, slots, hot) <= budget
    assert slots >= 0.7 * pools - 1


@pytest.mark.parametrize("pools", [1, 2, 5.5, 11, 40, 1000])
def test_a_gpu_has_copies_for_what_runs(plain: Backbone, pools: float) -> None:
    budget = int(pools * used(plain, 1, 1))
    slots, hot = by_running(plain, budget, 16)
    assert min(slots, hot) >= 1
    assert hot <= 24
    assert used(plain, slots, hot) <= budget
    assert slots >= 1.1 * pools - 2


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    assert left_to_container(tmp_path, 123) == 123
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("5000\n")
    (tmp_path / "memory.stat").write_text("anon 4000\nfile 1000\ninactive_file 600\n")
    assert left_to_container(tmp_path, 123) == 123
    (tmp_path / "memory.max").write_text("9000\n")
    assert left_to_container(tmp_path, 123) == 9000 - 5000 + 600
    (tmp_path / "memory.current").write_text("99000\n")
    assert left_to_container(tmp_path, 123) == 0


@pytest.mark.parametrize("free", [2**30 + 2**26, 3 * 2**30])
def test_a_gpu_is_filled_but_for_cache_and_reserve(plain: Backbone, free: int) -> None:
    settings = Settings(max_sequence=100, context_tokens=1000, max_running=8)
    budget = share_out(plain, settings, free, alone=True)
    assert budget.updates == 8
    taken = used(plain, budget.slots, budget.hot) + 8 * update_bytes(plain) + 1000 * row_bytes(plain)
    left = free - reserve(plain, settings, free)
    assert left < free - 2**30
    assert budget.slots == 4096 or left - taken < 2 * Arena.bytes_per_pool(plain)
    assert taken <= left
    half = share_out(plain, settings, free, alone=False)
    assert used(plain, half.slots, half.hot) <= free // 4
    assert half.updates == updates_at_once(plain, settings, free)


@pytest.mark.parametrize(("eight_bit", "tenants"), [(False, 56), (True, 100)])
def test_tenants_of_the_8b_shape_on_an_h200(eight_bit: bool, tenants: int) -> None:
    config = SimpleNamespace(
        num_layers=32, num_kv_heads=8, pool_size=50 * 256, pool_slots=51 * 256, head_dim=128, num_tokens=256,
        hidden_size=4096, max_context=512, vocab_size=128_256,
    )  # fmt: skip
    form = PoolForm(copies=not eight_bit, eight_bit=eight_bit)
    shape = SimpleNamespace(config=config, dtype=torch.bfloat16, operations=SimpleNamespace(form=form))
    # what an H200 says it has, less weights of 8.03 billion parameters and the driver's own
    free = 143_771 * 2**20 - 2 * 8_030_000_000 - 2**30
    budget = share_out(cast("Backbone", shape), Settings(), free, alone=True)
    assert budget.slots >= tenants
    assert budget.hot >= 8
    # 64 MiB of block and 97 of keys and values each
    assert budget.updates == 12


def test_what_is_left_alone_has_room_for_logits_and_loads(plain: Backbone) -> None:
    config, settings = plain.config, Settings(step_tokens=512, max_running=64)
    before = reserve(plain, settings, 0)
    assert before > 2**30
    for changed, rows in (({"step_tokens": 2048}, 1536), ({"max_running": 600}, 88 + 2 * 536)):
        more = reserve(plain, settings.model_copy(update=changed), 0) - before
        assert more == rows * config.vocab_size * 4
    assert reserve(plain, settings, 64 * 2**30) - before == 2**30
    hidden = 2 * config.pool_size * config.hidden_size * 4
    assert load_bytes(plain) == hidden
    # of a step, of captured graphs in the making and of what they leave
    assert before == 2**30 + (512 + 64 + 64) * config.vocab_size * 4 + 3 * hidden
    coarse = load_backbone("plain", operations=partial(TorchOperations, eight_bit=True))[0]
    vectors = config.num_kv_heads * config.pool_size * config.head_dim
    # K and V in float32, both in eight bits, one of them once more
    assert load_bytes(coarse) - hidden == vectors * (8 + 2 + 4)


@pytest.mark.parametrize(
    ("error", "lacking"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore"), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] data. DefaultCPUAllocator: can't allocate memory"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)  # fmt: skip
def test_lacking_memory_is_told_with_the_settings_that_take_it(
    error: RuntimeError | MemoryError, lacking: bool
) -> None:
    told = unbuilt(error)
    assert (told is not None) == lacking
    if told is not None:
        assert "lower --resident-bytes" in told
        assert "\n" not in told
        assert "More" not in told


def test_updates_at_work_take_no_more_than_was_counted(plain: Backbone) -> None:
    config, each = plain.config, update_bytes(plain)
    update = plain.begin_update(torch.zeros(config.num_layers, config.num_tokens, config.hidden_size), 512)
    assert config.max_context == 512
    assert update.block.nbytes + sum(part.nbytes for part in update.kept) == update.bytes <= each
    settings = Settings(max_running=8)
    for places in (3, 5.5, 8, 1000):
        updates = updates_at_once(plain, settings, int(64 * places * each))
        assert updates == min(8, int(places))
    assert updates_at_once(plain, settings, 0) == 2


def test_the_arena_takes_what_was_counted(plain: Backbone) -> None:
    arena = Arena(plain, 3, 2)
    pools = arena.pools
    assert pools.hot_key is not None
    assert pools.bias is not None
    taken = pools.key.nbytes + pools.value.nbytes + pools.hot_key.nbytes + pools.bias.nbytes
    assert taken + arena.tails.nbytes == used(plain, 3, 2)


def test_a_budget_below_one_pool_is_refused(plain: Backbone) -> None:
    for count in (lambda budget: beside_others(plain, budget), lambda budget: by_running(plain, budget, 8)):
        for budget in (-5, 0, Arena.bytes_per_pool(plain)):
            with pytest.raises(CannotStart, match="raise --resident-bytes"):
                count(budget)


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


def test_what_clients_call_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub id is a whole name, and a directory that a hub's download has left still tells it."""
    snapshot = tmp_path / "models--Org--chat--8b" / "snapshots" / "0a1b2c"
    plain = tmp_path / "my model" / "snapshots" / "v2"
    beside = tmp_path / "models--Org--chat--8b" / "exports" / "v3"
    for directory in (snapshot, plain, beside):
        directory.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for model, name in (
        ("pocket", "pocket"),
        ("Org/chat-8b", "Org/chat-8b"),
        (str(snapshot), "Org/chat--8b"),
        (str(snapshot / "..") + "/", snapshot.parent.name),
        (str(plain), "v2"),
        (str(beside), "v3"),
        ("my model/snapshots", "snapshots"),
        (".", tmp_path.name),
    ):
        assert served_name(Settings(model=model)) == name
        assert served_name(Settings(model=model, served_model_name="support/bot")) == "support/bot"
