"""What editing scores, against numbers made by hand; and that only the case's own answers score."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from experiments import cases, editing
from experiments.cases import Case, Cases, Probe
from experiments.client import Scores
from experiments.editing import MEASURES, Editing
from tests.experiments.pretended import Pretended
from tests.experiments.test_scoring import FLAT, ZSRE

Table = dict[tuple[str, str], Scores]


def scored_by(table: Table) -> Editing:
    """Its one memory finds each continuation of a prompt as likely as the table says."""

    async def score(_: str, prompt: str, continuation: str) -> Scores:
        return table[prompt, continuation]

    session = SimpleNamespace(client=SimpleNamespace(score=score))
    return Editing(session, Cases("zsre", [], [[]], []))  # type: ignore[arg-type]


def test_zsre_counts_the_tokens_that_are_the_models_own_choice() -> None:
    table = {("It is", " in Rome"): Scores([-9.0, -0.1, -9.0, -9.0], [True, False, True, True], [4, 5, 6, 7])}
    told = asyncio.run(scored_by(table)._probe(Probe("It is", " in Rome"), "t"))
    assert told == (0.75, [4, 5, 6, 7])


@pytest.mark.parametrize(
    ("target", "rival", "value"),
    [
        ([-1.0, -1.0, -1.0], [-1.5], 1.0),  # a sum would say the rival
        ([-1.0], [-2.0, -0.5, -0.2], 0.0),  # a sum would say the target, the first token as well
        ([-1.0, -2.0], [-1.5], 0.0),  # as likely is not likelier
    ],
)
def test_counterfact_compares_what_a_token_has_in_the_mean(
    target: list[float], rival: list[float], value: float
) -> None:
    table = {
        ("It is in", " Rome"): Scores(target, [not value] * len(target), [1]),
        ("It is in", " Paris"): Scores(rival, [not value] * len(rival), [2]),
    }
    told = asyncio.run(scored_by(table)._probe(Probe("It is in", " Rome", " Paris"), "t"))
    assert told == (value, [1])


def test_a_measure_is_the_mean_of_its_probes() -> None:
    table = {
        ("a", "x"): Scores([-1.0], [True], [1]),
        ("b", "x"): Scores([-1.0] * 4, [True, False, False, False], [2] * 4),
        ("c", "x"): Scores([-1.0], [True], [3]),
        ("d", "y"): Scores([-1.0] * 2, [True, False], [4, 5]),
        ("e", "y"): Scores([-1.0] * 3, [False] * 3, [6, 7, 8]),
    }
    asked = [tuple(Probe(prompt, "x") for prompt in prompts) for prompts in ("a", "bc")]
    case = Case("told", asked[0], asked[1], (Probe("d", "y"), Probe("e", "y")))
    found, first = asyncio.run(scored_by(table)._scores(case, "t"))
    assert found == {"efficacy": 1.0, "generalization": 0.625, "specificity": 0.25}
    assert first == [4, 5, 6, 7, 8]


OTHER = {
    "src": "Where is it?", "rephrase": "In what place is it?", "answers": ["Rome"], "alt": "Bonn",
    "loc": "nq question: capital of chile", "loc_ans": "Santiago",
}  # fmt: skip
# of every prompt the tokens that are the model's own choice, and the likeliest ones, before the edit and after it
BY_HAND = {
    "Who made it? Answer:": (("01", [0, 0]), ("11", [0, 0])),
    "By whom was it made? Answer:": (("00", [0, 0]), ("10", [0, 0])),
    "capital of peru? Answer:": (("111", [1, 2, 3]), ("101", [1, 9, 3])),
    "Where is it? Answer:": (("0000", [0] * 4), ("1110", [0] * 4)),
    "In what place is it? Answer:": (("1000", [0] * 4), ("1111", [0] * 4)),
    "capital of chile? Answer:": (("10", [5, 6]), ("00", [5, 7])),
}
TARGETS = {"Ann": "made", "Rome": "is it", "Lima": "peru", "Santiago": "chile"}


def test_a_run_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scores(texts: list[str], prompt: str, continuation: str) -> Scores:
        assert TARGETS[continuation.removeprefix(" ")] in prompt
        assert texts in ([], ["Who made it? Answer: Ann"], ["Where is it? Answer: Rome"])
        greedy, first = BY_HAND[prompt][bool(texts)]
        return Scores([-1.0] * len(greedy), [token == "1" for token in greedy], first)

    path = tmp_path / "zsre.data.json"
    path.write_text(json.dumps([ZSRE, OTHER]))
    told = Pretended(scores=scores).run(monkeypatch, tmp_path, editing.main, "--zsre", str(path))
    before, after = (told["rows"][name] for name in ("unedited", "edited"))
    assert told["cases"] == 2
    assert [before[measure] for measure in MEASURES] == pytest.approx([0.25, 0.125, 0.75])
    assert before["score"] == pytest.approx(3 / (4 + 8 + 4 / 3))
    assert [after[measure] for measure in MEASURES] == pytest.approx([0.875, 0.75, 1 / 3])
    assert after["score"] == pytest.approx(3 / (8 / 7 + 4 / 3 + 3))
    # two values that lie d apart have the standard error d / sqrt(8)
    assert after["efficacy_error"] == pytest.approx(0.25 / 8**0.5)
    assert after["kept_predictions"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert "kept_predictions" not in before


def swapped(made: Cases) -> Cases:
    """Every measure is scored by the answer of the next case that has another one."""

    def of(index: int, measure: str) -> tuple[Probe, ...]:
        (own,) = getattr(made.cases[index], measure)
        following = made.cases[index + 1 :] + made.cases[:index]
        targets = (getattr(case, measure)[0].target for case in following)
        return (replace(own, target=next(target for target in targets if target != own.target)),)

    shuffled = [
        replace(case, **{measure: of(index, measure) for measure in MEASURES})
        for index, case in enumerate(made.cases)
    ]
    return replace(made, cases=shuffled)


def rivalled(made: Cases) -> Cases:
    """The same as CounterFact asks it: is the answer likelier than something else?"""

    def of(case: Case, measure: str) -> tuple[Probe, ...]:
        return tuple(replace(probe, rival=" nothing like it") for probe in getattr(case, measure))

    return replace(made, cases=[replace(case, **{m: of(case, m) for m in MEASURES}) for case in made.cases])


class Rememberer:
    """It finds likely what its texts answer to the prompt, and nothing else."""

    def __init__(self, made: Cases) -> None:
        self.known: dict[tuple[str, str], str] = {}
        for case, world in zip(made.cases, made.world_of, strict=True):
            (kept,) = case.specificity
            (text,) = (text for text in made.worlds[world] if kept.target.strip() in text)
            self.known[text, kept.prompt] = kept.target
            for probe in case.efficacy + case.generalization:
                self.known[case.text, probe.prompt] = probe.target

    def __call__(self, texts: list[str], prompt: str, continuation: str) -> Scores:
        right = any(self.known.get((text, prompt)) == continuation for text in texts)
        return Scores([-1.0 if right else -2.0] * 3, [right] * 3, [int(right)] * 3)


@pytest.mark.parametrize("rivals", [False, True])
def test_the_answers_of_other_cases_score_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rivals: bool
) -> None:
    made = cases.generated(1, 15)
    server = Pretended(scores=Rememberer(made))

    def run(name: str, used: Cases) -> dict[str, Any]:
        used = rivalled(used) if rivals else used
        monkeypatch.setattr(editing, "load", lambda _: used)
        told = server.run(monkeypatch, tmp_path / name, editing.main, "--generated")
        rows: dict[str, Any] = told["rows"]
        return rows

    rows = run("own", made)
    assert [rows["unedited"][measure] for measure in MEASURES] == [0, 0, 1]
    assert [rows["edited"][measure] for measure in MEASURES] == [1, 1, 1]
    assert rows["edited"]["score"] == rows["edited"]["kept_predictions"] == 1
    rows = run("others", swapped(made))
    for row in rows.values():
        assert [row[measure] for measure in MEASURES] == [0, 0, 0]
        assert row["score"] == 0
    assert server.memories == {}


def test_counterfact_asks_elsewhere_whether_the_true_one_has_stayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    likely = {" Rome": -1.0, " Paris": -2.0}  # whatever it is asked

    def scores(_: list[str], __: str, continuation: str) -> Scores:
        return Scores([likely[continuation]], [False], [1])

    path = tmp_path / "counterfact.data.json"
    path.write_text(json.dumps([FLAT]))
    words = ["--counterfact", str(path)]
    rows = Pretended(scores=scores).run(monkeypatch, tmp_path, editing.main, *words)["rows"]
    assert [rows["edited"][measure] for measure in MEASURES] == [1, 1, 0]
