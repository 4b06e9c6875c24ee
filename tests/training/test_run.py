"""A whole run of the trainer at a tiny size, by a clock of its own: a step takes as long as the clock says."""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from training import train
from training.optimizer import Optimizer
from training.train import Trainer

SECONDS = 2.0
BATCH = 8


def asked(folder: Path, minutes: float) -> argparse.Namespace:
    words = ["--tokenizer", folder / "tokenizer.json", "--out", folder / "run", "--minutes", minutes]
    words += ["--batch", BATCH, "--processes", 1, "--log-every", 5, "--dtype", "float32", "--rate", 0.05]
    words += ["--width", 32, "--layers", 2, "--heads", 2, "--inner", 48, "--seed", 3]
    return train.options().parse_args([*map(str, words)])


@pytest.fixture
def clocked(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tokenizer. Whoever looks at the clock finds it ``SECONDS`` later."""
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "run").mkdir()
    now = 0.0

    def time() -> float:
        nonlocal now
        now += SECONDS
        return now

    monkeypatch.setattr(train, "time", SimpleNamespace(time=time))
    return tmp_path


def points(folder: Path) -> list[dict[str, str]]:
    with (folder / "run" / "curve.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_run_learns_and_averages_until_its_time_is_spent(
    clocked: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[tuple[float, float]] = []
    step = Optimizer.step

    def watched(optimizer: Optimizer, gradients: dict[str, Tensor], rate: float, muon_rate: float) -> None:
        rates.append((rate, muon_rate))
        step(optimizer, gradients, rate, muon_rate)

    monkeypatch.setattr(Optimizer, "step", watched)
    trainer = Trainer(asked(clocked, 2.5), 0)
    start = {name: tensor.clone() for name, tensor in trainer.average.items()}
    trainer.run()
    steps = len(rates)
    assert trainer.step == steps > 25
    assert 2.5 <= trainer.minutes < 2.5 + 10 * SECONDS / 60
    assert f"done after {steps} steps, {steps * BATCH} contexts" in capsys.readouterr().out
    # it warms up, and decays over the last part of its time
    assert rates[0] == (pytest.approx(0.05 / 150), pytest.approx(0.004 / 150))
    assert rates[steps // 2][0] == pytest.approx(0.05 * (steps // 2 + 1) / 150)
    assert rates[-1][0] < 0.05 * steps / 150 / 10
    curve = points(clocked)
    assert [int(point["step"]) for point in curve] == list(range(5, steps + 1, 5))
    losses = [float(point["answer_loss"]) for point in curve]
    assert losses[-1] < losses[0] - 0.7
    # the average comes along behind the weights
    for name, weight in trainer.model.named_parameters():
        average = trainer.average[name]
        assert 0 < (average - weight).norm() < (start[name] - weight).norm(), name


def test_a_run_ends_once_and_a_longer_one_goes_on(clocked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = Trainer(asked(clocked, 0.6), 0)
    trainer.run()
    steps = trainer.step
    assert steps > 5
    kept = (clocked / "run" / "state.json").read_text()
    again = Trainer(asked(clocked, 0.6), 0)
    again.run()
    assert again.step == steps
    assert (clocked / "run" / "state.json").read_text() == kept
    longer = Trainer(asked(clocked, 1.2), 0)
    assert all(torch.equal(tensor, trainer.average[name]) for name, tensor in longer.average.items())
    # an exact match in nearly all is the end of a stage
    longer.exact = 1.0
    longer.run()
    assert longer.step > steps + 5
    assert f"--- step {steps + 1}: on to {longer.stages[1].name}" in capsys.readouterr().out
    curve = points(clocked)
    assert [int(point["step"]) for point in curve] == list(range(5, longer.step + 1, 5))
    assert {point["stage"] for point in curve} == {stage.name for stage in longer.stages[:2]}
    state = json.loads((clocked / "run" / "state.json").read_text())
    assert (state["step"], state["stage"]) == (longer.step, 1)
