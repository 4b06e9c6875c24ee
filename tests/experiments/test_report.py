"""The page shows old results and new ones, and names a command that makes it."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

import pytest

from experiments import everything, machine, report

TOLD: dict[str, Any] = {
    "command": "python -m experiments.x", "seed": 1, "machine": "2 cores", "device": "cpu, float32",
    "date": "2026-11-28",
}  # fmt: skip


def test_the_command_on_the_page_makes_the_page() -> None:
    lines = [
        line for line in report.INTRODUCTION.replace("\\\n", " ").splitlines() if line.startswith("    ")
    ]
    (command,) = (shlex.split(line) for line in lines if "everything" in line)
    assert command[:3] == ["python", "-m", "experiments.everything"]
    given = everything.options().parse_args(command[3:])
    assert given.page == Path("docs/results.md")
    assert given.results == Path("docs/results")
    assert {words[0] for words in everything.plan(given)} == set(report.SECTIONS)


def test_the_page_is_what_the_results_make() -> None:
    page = Path("docs/results.md")
    assert page.read_text("utf-8") == report.page(Path("docs/results"), page)


def test_the_page_says_how_answers_were_judged() -> None:
    for experiment, settings, rule in [
        ("retention", {"squad": None}, "exact"),
        ("retention", {"squad": "s.json"}, "holds"),
        ("retention", {"squad": None, "judge": "holds"}, "holds"),
        ("integrity", {"judge": "exact"}, "exact"),
    ]:
        shown = report.origin(TOLD | {"experiment": experiment, "settings": settings})
        assert shown.endswith(f"; judged: {rule}.")
    assert "judged" not in report.origin(TOLD | {"experiment": "editing", "settings": {}})
    assert report.origin(TOLD | {"experiment": "forgetting"}).endswith("exact.")
    assert report.origin(TOLD | {"experiment": "forgetting", "judge": "holds"}).endswith("holds.")


def test_forgetting_is_shown_with_its_models_and_without() -> None:
    row = {"step": 0, "memory": 1.0, "survival": {"closed_form": 1.0}, "items": 3}
    shape: dict[str, Any] = {"rows": [row]}
    old = {"minutes": 1.5, "shapes": {"K8-N200": shape}}
    assert "| K8-N200 | 100.0%" in report.forgetting(old)
    assert "the same weights;" in report.forgetting(old)
    new = old | {"start": "0123456789", "shapes": {"K8-N200": shape | {"fingerprint": "abcdefghij"}}}
    assert "| K8-N200 (abcdefgh) | 100.0%" in report.forgetting(new)
    assert "the same weights (01234567);" in report.forgetting(new)
    assert "which had been trained as K1-N2 and" in report.forgetting(new | {"start_shape": "K1-N2"})


def test_prompts_that_did_not_fit_are_not_counted() -> None:
    settings = {"squad": None, "warm": 0, "shuffle": False}
    survival = {"measured": 1.0, "closed_form": 1.0, "standard_error": 0.0, "distance": None}
    row: dict[str, Any] = {
        "step": 0,
        "items": 9,
        "memory": 1.0,
        "empty": 0.0,
        "prompt": 0.5,
        "survival": survival,
    }
    for counted, shown in (
        ({"prompts": 4}, "| 50.0% of 4 |"),
        ({"prompts": 9}, "| 50.0% |"),
        ({}, "| 50.0% |"),
    ):
        assert shown in report.retention({"settings": settings, "rows": [row | counted]})
    assert "empty memory" in report.retention({"settings": settings, "rows": [row]})
    warm = report.retention({"settings": settings | {"warm": 5}, "rows": [row]})
    assert "before it was told" in warm
    assert "empty memory" not in warm


def test_a_machine_that_does_not_tell_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert machine.machine().startswith("7 cores, ")


def test_a_client_elsewhere_is_said() -> None:
    here = ["http://127.0.0.1:8000", "http://localhost", "http://[::1]:1"]
    assert "client" not in machine.machine(*here)
    for url in ("http://10.0.0.7:8000", "https://models.example"):
        assert machine.machine(*here, url).startswith("client: ")
