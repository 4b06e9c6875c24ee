"""The mean of two models is a model: every tensor's, and nothing of other shapes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from training.mean import main, mean
from training.model import MemoryModel
from training.published import load_published, save_published


def test_it_is_published_as_both_were(
    tmp_path: Path, model: MemoryModel, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = model.state_dict()
    for name, factor in (("one", 1.0), ("other", 3.0)):
        save_published({k: t * factor for k, t in state.items()}, model.config, tokenizer, tmp_path / name)
    words = [str(tmp_path / "one"), str(tmp_path / "other"), "--out", str(tmp_path / "mean")]
    monkeypatch.setattr(sys, "argv", ["mean", *words])
    main()
    made = load_published(tmp_path / "mean").state_dict()
    assert made.keys() == state.keys()
    for name, tensor in made.items():
        torch.testing.assert_close(tensor, 2 * state[name])


def test_models_of_other_shapes_have_none() -> None:
    with pytest.raises(ValueError, match="differ"):
        mean({"a": torch.zeros(2)}, {"a": torch.zeros(3)})
