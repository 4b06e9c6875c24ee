"""A run that begins from a published model, with blocks and pools of another size."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from training import train
from training.model import MemoryModel
from training.progress import Point
from training.published import load_published, save_published
from training.reshape import begin, reshaped
from training.train import Trainer, main, options


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
    arguments = given(tmp_path)
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


def given(folder: Path, *words: str) -> argparse.Namespace:
    files = ["--tokenizer", str(folder / "tokenizer.json"), "--out", str(folder / "run")]
    return options().parse_args([*files, "--minutes", "1", "--batch", "16", "--processes", "1", *words])


def test_a_run_of_other_sizes_is_trained_and_published(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "run").mkdir()
    sizes = ["--width", "24", "--layers", "2", "--heads", "2", "--inner", "40"]
    trainer = Trainer(given(tmp_path, *sizes), 0)
    config = trainer.model.config
    assert (config.hidden_size, config.num_layers, config.num_heads, config.intermediate_size) == (
        24,
        2,
        2,
        40,
    )
    loss, _ = trainer.loss()
    gradients, _ = trainer.gradients(loss, [0.0])
    trainer.optimizer.step(gradients, 1e-3, 1e-3)
    trainer.step = 1
    trainer.save()
    save_published(trainer.average, config, tokenizer, tmp_path / "model")
    assert load_published(tmp_path / "model").config == config
    # a run that goes on keeps its own
    assert Trainer(given(tmp_path), 0).model.config == config


@pytest.mark.parametrize("sizes", [["--heads", "5"], ["--width", "9", "--heads", "3"]])
def test_heads_that_cannot_be_are_refused(
    sizes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--tokenizer", "t", "--out", str(tmp_path / "run"), "--minutes", "1", *sizes]
    monkeypatch.setattr(sys, "argv", ["train", *words])
    with pytest.raises(SystemExit):
        main()
    assert "--width" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def interrupted(path: Path, text: str, **_: str) -> None:
    path.write_bytes(text[:9].encode())
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("words", "reason"), [([], "no GPU"), (["--processes", "2"], "one process")], ids=["none", "two"]
)
def test_a_gpu_that_is_not_there_is_said_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    words: list[str], reason: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    files = ["--tokenizer", "t.json", "--out", str(tmp_path / "run"), "--minutes", "1"]
    monkeypatch.setattr(sys, "argv", ["train", *files, "--device", "cuda", *words])
    with pytest.raises(SystemExit):
        main()
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_process_makes_its_tensors_on_the_device_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[torch.device] = []

    class Watched:
        def __init__(self, *_: object) -> None:
            made.append(torch.zeros(1).device)

        def run(self) -> None:
            pass

    monkeypatch.setattr(train, "Trainer", Watched)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    try:
        for device in ("meta", "cpu"):
            train.work(0, argparse.Namespace(device=device, processes=1))
    finally:
        torch.set_default_device(None)
    assert made == [torch.device("meta"), torch.device("cpu")]
