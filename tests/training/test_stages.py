"""The curriculum, and the pools that the trainer makes of its mixtures."""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from training.model import MemoryModel, compute_dtype
from training.pools import gather_pools
from training.reshape import begin, reshaped
from training.stages import Mixture, Old, curriculum
from training.train import CACHE_BLOCKS, Trainer


@pytest.fixture
def trainer(model: MemoryModel, tokenizer: Tokenizer, tmp_path: Path) -> Trainer:
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    begin(reshaped(model, 4, 20), tmp_path / "run")
    arguments = argparse.Namespace(
        seed=0, tokenizer=tmp_path / "tokenizer.json", rope_theta=10_000.0, width=192, layers=4, heads=3, inner=512,
        adamw=False, text=None, batch=16,
        out=tmp_path / "run", processes=1, minutes=1.0, decay=0.3, question_weight=0.2, dtype="float32",
    )  # fmt: skip
    made = Trainer(arguments, 0)
    made.cache = torch.zeros(model.config.num_layers, CACHE_BLOCKS, 4, model.config.hidden_size)
    made.cache_keys = [frozenset()] * CACHE_BLOCKS
    return made


def test_every_stage_uses_the_whole_batch_and_pools_it_can_have() -> None:
    for num_blocks in (25, 50):
        for stage in curriculum(48, num_blocks):
            for mixture in stage.mixtures:
                assert mixture.groups * mixture.shape.contexts == 48
                assert mixture.window <= num_blocks
                spans = mixture.below, mixture.among, mixture.above
                assert all(0 <= low <= high for low, high in spans)
                # a pool takes each of the blocks kept from earlier steps once, and some before there are many
                assert sum(high for _, high in spans) <= CACHE_BLOCKS // 2


def test_the_last_stage_asks_for_blocks_of_which_a_third_is_left() -> None:
    """After 50 updates of a pool of 50 blocks, 36 % are left: more than one answer in ten comes from there or older."""
    rng, old = random.Random(0), 0.0
    for mixture in curriculum(48, 50)[-1].mixtures:
        own = mixture.shape.contexts
        for _ in range(200):
            order = mixture.old(rng).order(own, rng)
            old += (
                mixture.share
                / 200
                * np.mean([len(order) - 1 - order.index(block) >= 45 for block in range(own)])
            )
    assert old > 0.1


def test_the_last_stage_asks_in_pools_of_which_nothing_of_the_initial_block_is_left() -> None:
    full = [mixture for mixture in curriculum(48, 50)[-1].mixtures if mixture.below[0] >= 150]
    assert sum(mixture.share for mixture in full) > 0.25
    # and in half of them about what was told last
    assert sum(mixture.share for mixture in full if mixture.among[1] + mixture.above[1] < 10) > 0.1


@pytest.mark.parametrize("old", [Old(0, 0, 10), Old(10, 0, 0), Old(0, 10, 0), Old(3, 4, 3)])
def test_old_blocks_lie_below_among_and_above_a_group(trainer: Trainer, old: Old) -> None:
    mixture = trainer.stages[-1].mixtures[-1]
    mixture = Mixture(1.0, 2, mixture.shape, 20)
    groups, picks = trainer._groups(2, mixture.shape, old)
    assert [len(picked) for picked in picks] == [10, 10]
    orders = trainer._order(groups, picks, old)
    own = len(groups[0].examples)
    for order in orders:
        places = [order.index(block) for block in range(own)]
        assert places == sorted(places)
        first, last = places[0], places[-1]
        assert first >= old.below
        assert own + 9 - last >= old.above
        if not old.among:
            assert last - first == own - 1
        assert sorted(order) == list(range(own + 10))
    if old.among == 10:
        assert any(order[:own] != list(range(own)) for order in orders)
    ranks = trainer._ranks(orders, mixture)
    assert ranks.shape == (trainer.model.config.num_layers, 2, 20 * trainer.model.config.num_tokens)


def test_a_bank_keeps_of_the_old_blocks_only_what_is_left_of_them(trainer: Trainer) -> None:
    """The pools read from it are those that the whole bank gives."""
    config, old = trainer.model.config, Old(120, 3, 2)
    trainer.cache = torch.randn_like(trainer.cache)
    mixture = Mixture(1.0, 2, trainer.stages[-1].mixtures[-1].shape, 20)
    groups, picks = trainer._groups(2, mixture.shape, old)
    ranks = trainer._ranks(trainer._order(groups, picks, old), mixture)
    own = sum(len(group.examples) for group in groups)
    new = torch.randn(config.num_layers, own, config.num_tokens, config.hidden_size)
    bank, places = trainer._bank(new, ranks, picks)
    assert bank.shape[2] < (own // 2 + old.count) * config.num_tokens / 2
    stale = trainer.cache[:, torch.tensor(picks).flatten()].reshape(
        config.num_layers, 2, -1, config.hidden_size
    )
    initial = trainer.model.initial_block[:, None].expand(-1, 2, -1, -1)
    whole = torch.cat([new.view(config.num_layers, 2, -1, config.hidden_size), stale, initial], 2)
    assert torch.equal(gather_pools(bank, places), gather_pools(whole, ranks))


def test_no_old_block_is_taken_before_there_are_enough(trainer: Trainer) -> None:
    mixture = trainer.stages[-1].mixtures[-1]
    assert trainer._old(mixture).count > 0
    trainer.cache = trainer.cache[:, : CACHE_BLOCKS // 2 - 1]
    assert trainer._old(mixture) == Old(0, 0, 0)


def test_bfloat16_is_taken_only_where_the_processor_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, expected in (
        ("avx512_bf16", torch.bfloat16),
        ("amx_bf16", torch.bfloat16),
        ("avx2", torch.float32),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda name=name: {name: True, "avx512_f": True})
        assert compute_dtype("auto") == expected
        assert compute_dtype("float32") == torch.float32
        assert compute_dtype("bfloat16") == torch.bfloat16


def test_on_a_gpu_its_own_word_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_default_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    for has, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda has=has: has)
        assert compute_dtype("auto") == expected
