"""A model of another recipe than the one asked for is not taken for it."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from experiments import forgetting, retention
from experiments.session import measured
from training import train
from training.published import load_published


def asked(folder: Path, *words: str) -> argparse.Namespace:
    return forgetting.options().parse_args(["--results", str(folder), "--minutes", "0", *words])


def test_a_model_of_other_settings_is_refused_or_made_anew(tmp_path: Path) -> None:
    start, text = tmp_path / "start", tmp_path / "text"
    text.mkdir()
    (text / "a.txt").write_text("some text")
    shutil.copytree("app/pocket", start)
    words = ["--start", str(start), "--text", str(text)]
    model = forgetting.trained(asked(tmp_path, *words), 16, 2)
    other = forgetting.trained(asked(tmp_path, *words), 16, 3)
    assert forgetting.trained(asked(tmp_path, *words), 16, 2) == model
    (model / "seen").write_text("")
    changes: list[tuple[list[str], str]] = [
        (["--seed", "2"], "seed"), (["--minutes", "1"], "minutes"), (["--processes", "2"], "processes"),
    ]  # fmt: skip
    for changed, name in changes:
        with pytest.raises(SystemExit, match=f"other settings \\({name}\\)"):
            forgetting.trained(asked(tmp_path, *words, *changed), 16, 2)
    (text / "b.txt").write_text("more")
    with (start / "config.json").open("a") as config:
        config.write(" ")
    with pytest.raises(SystemExit, match=r"\(start, text\); --fresh"):
        forgetting.trained(asked(tmp_path, *words), 16, 2)
    assert (model / "seen").exists()
    assert forgetting.trained(asked(tmp_path, *words, "--fresh"), 16, 2) == model
    assert not (model / "seen").exists()
    assert other.exists()
    # one that older code has left tells nothing
    (model.parent / "made.json").unlink()
    with pytest.raises(SystemExit, match="other settings"):
        forgetting.trained(asked(tmp_path, *words), 16, 2)
    with pytest.raises(SystemExit, match="config"):
        forgetting.trained(asked(tmp_path, "--start", str(text)), 16, 2)


def test_a_model_of_which_half_was_written_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = forgetting.save_published

    def torn(*given: Any) -> None:
        whole(*given)
        (given[-1] / "tokenizer_config.json").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(forgetting, "save_published", torn)
    with pytest.raises(KeyboardInterrupt):
        forgetting.trained(asked(tmp_path), 16, 2)
    monkeypatch.setattr(forgetting, "save_published", whole)
    model = forgetting.trained(asked(tmp_path), 16, 2)
    assert (model / "tokenizer_config.json").exists()


def test_a_training_is_asked_for_as_it_was_and_its_average_is_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child is none: it takes its words as the trainer does, and moves a weight of the average."""
    text = tmp_path / "text"
    text.mkdir()
    words = ["--minutes", "1.5", "--seed", "7", "--processes", "3", "--text", str(text)]
    given = asked(tmp_path, *words)
    run = tmp_path / "forgetting" / "K8-N80"
    begun: list[argparse.Namespace] = []
    codes = [1, 0]

    def child(command: list[str]) -> int:
        assert command[:3] == [sys.executable, "-m", "training.train"]
        told = train.options().parse_args(command[3:])
        begun.append(told)
        state = json.loads((told.out / "state.json").read_text())
        assert (state["config"]["num_tokens"], state["config"]["num_blocks"]) == (8, 10)
        path = told.out / "average.safetensors"
        average = load_file(path)
        average["initial_block"] += 1
        save_file(average, path)
        return codes.pop(0)

    monkeypatch.setattr(forgetting.children, "run", child)
    with pytest.raises(SystemExit, match="K8-N80 failed; the same command goes on from here"):
        forgetting.trained(given, 8, 10)
    assert not list(run.glob("model*"))
    model = forgetting.trained(given, 8, 10)
    for told in begun:
        assert (told.out, told.tokenizer) == (run, Path("app/pocket/tokenizer.json"))
        assert (told.minutes, told.seed, told.processes, told.text) == (1.5, 7, 3, text)
    # the second went on with what the first had left
    start = load_published(Path("app/pocket"))
    made = load_published(model)
    assert (made.config.num_tokens, made.config.num_blocks) == (8, 10)
    assert torch.allclose(made.initial_block, start.initial_block[:, :8] + 2, atol=1e-5)
    # and it is not trained again
    assert forgetting.trained(given, 8, 10) == model
    assert len(begun) == 2


def test_a_shape_names_the_command_that_measured_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[argparse.Namespace] = []
    monkeypatch.setattr(forgetting, "conduct", lambda _, given, *__: kept.append(given))
    forgetting.measure(asked(tmp_path, "--items", "3"), "K8-N80", "http://127.0.0.1:9")
    forgetting.measure(asked(tmp_path, "--models", "a=b"), "a", "http://127.0.0.1:9")
    forgetting.measure(asked(tmp_path, "--models", "a=b", "--judge", "exact"), "a", "http://127.0.0.1:9")
    told = retention.options().parse_args(measured(kept[0].words))
    assert (told.items, told.judge) == (3, "exact")
    assert [given.judge for given in kept] == ["exact", "holds", "exact"]


def test_the_results_name_weights(tmp_path: Path) -> None:
    given = asked(tmp_path, "--items", "3")
    row = {"step": 0, "memory": 1.0, "survival": {"closed_form": 1.0}, "items": 3}
    shape = {"num_tokens": 16, "num_blocks": 2}
    one = {"device": "cpu", "settings": {"fingerprint": "f"}, "shape": shape, "rows": [row]}
    forgetting.report(given, {"K16-N32": "folder"}, {"K16-N32": one}, [])
    told = json.loads((tmp_path / "forgetting.json").read_text())
    assert told["start"] == forgetting.recipe(given)["start"]
    assert told["start_shape"] == "K16-N800"
    assert told["shapes"]["K16-N32"]["fingerprint"] == "f"
    assert "client" not in told["machine"]
