"""The curriculum, and the pools that the trainer makes of its mixtures."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from training.model import MemoryModel, compute_dtype
from training.reshape import begin, reshaped
from training.stages import Mixture, curriculum
from training.train import Trainer


@pytest.fixture
def trainer(model: MemoryModel, tokenizer: Tokenizer, tmp_path: Path) -> Trainer:
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    begin(reshaped(model, 4, 20), tmp_path / "run")
    arguments = argparse.Namespace(
        seed=0, tokenizer=tmp_path / "tokenizer.json", rope_theta=10_000.0, adamw=False, text=None, batch=16,
        out=tmp_path / "run", processes=1, minutes=1.0, decay=0.3, question_weight=0.2, dtype="float32",
    )  # fmt: skip
    made = Trainer(arguments, 0)
    made.cache = torch.zeros(model.config.num_layers, 300, 4, model.config.hidden_size)
    made.cache_keys = [frozenset()] * 300
    return made


def test_every_stage_uses_the_whole_batch_and_pools_it_can_have() -> None:
    for num_blocks in (25, 50):
        for stage in curriculum(48, num_blocks):
            for mixture in stage.mixtures:
                assert mixture.groups * mixture.shape.contexts == 48
                assert mixture.window <= num_blocks
                assert 0 <= mixture.stale[0] <= mixture.stale[1]


def test_the_last_stage_asks_for_blocks_of_which_a_third_is_left() -> None:
    """After 50 updates of a pool of 50 blocks, 36 % are left: more than one answer in ten comes from there or older."""
    old = 0.0
    for mixture in curriculum(48, 50)[-1].mixtures:
        low, high = mixture.stale
        if mixture.buried:
            ages = [own + s for own in range(mixture.shape.contexts) for s in range(low, high + 1)]
            old += mixture.share * np.mean([age >= 45 for age in ages])
    assert old > 0.1


@pytest.mark.parametrize("buried", [True, False])
def test_a_buried_group_lies_below_every_stale_block(trainer: Trainer, buried: bool) -> None:
    mixture = trainer.stages[-1].mixtures[-1]
    mixture = Mixture(1.0, 2, mixture.shape, 20, (10, 10), buried)
    groups, picks = trainer._groups(mixture, mixture.shape)
    assert [len(picked) for picked in picks] == [10, 10]
    orders = trainer._order(groups, picks, mixture)
    assert orders is not None
    own = len(groups[0].examples)
    below = [order[:own] == list(range(own)) for order in orders]
    assert all(below) if buried else not any(below)
    assert all(sorted(order) == list(range(own + 10)) for order in orders)
    ranks = trainer._ranks(orders, mixture)
    assert ranks.shape == (trainer.model.config.num_layers, 2, 20 * trainer.model.config.num_tokens)


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
