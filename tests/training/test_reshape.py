"""A run that begins from a published model, with blocks and pools of another size."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from training.model import MemoryModel
from training.progress import Point
from training.reshape import begin, reshaped
from training.train import Trainer


@pytest.mark.parametrize("num_tokens", [4, 6, 9])
def test_only_the_initial_block_changes(model: MemoryModel, num_tokens: int) -> None:
    made = reshaped(model, num_tokens, 7)
    assert made.config.num_tokens == num_tokens
    assert made.config.num_blocks == 7
    for name, tensor in model.state_dict().items():
        other = made.state_dict()[name]
        if name == "initial_block":
            assert other.shape[1] == num_tokens
            both = min(num_tokens, model.config.num_tokens)
            assert torch.equal(other[:, :both], tensor[:, :both])
        else:
            assert torch.equal(other, tensor), name


def test_the_trainer_takes_up_its_shape(
    model: MemoryModel, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    made = reshaped(model, 4, 7)
    begin(made, tmp_path / "run")
    arguments = argparse.Namespace(
        seed=0, tokenizer=tmp_path / "tokenizer.json", rope_theta=10_000.0, adamw=False, text=None, batch=16,
        out=tmp_path / "run", processes=1, minutes=1.0, decay=0.3, question_weight=0.2, dtype="auto",
    )  # fmt: skip
    Point(50, 1.0, "full pool", 0.5, 0.25, 1.0, 1.0).keep(tmp_path / "run" / "curve.csv")
    trainer = Trainer(arguments, 0)
    # a point behind where the run stands comes again
    assert (tmp_path / "run" / "curve.csv").read_text().count("\n") == 1
    assert trainer.model.config == made.config
    assert trainer.stage == len(trainer.stages) - 1
    loss, _ = trainer.loss()
    assert loss.item() > 0
    # whatever interrupts a checkpoint, there is one
    with monkeypatch.context() as broken:
        broken.setattr(Path, "write_text", interrupted)
        for write in (trainer.save, lambda: begin(made, tmp_path / "run")):
            with pytest.raises(KeyboardInterrupt):
                write()
            assert json.loads((tmp_path / "run" / "state.json").read_text())["step"] == 0
    trainer.step = 7
    trainer.save()
    assert json.loads((tmp_path / "run" / "state.json").read_text())["step"] == 7


def interrupted(path: Path, text: str, **_: str) -> None:
    path.write_bytes(text[:9].encode())
    raise KeyboardInterrupt
