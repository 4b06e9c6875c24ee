"""What a template says itself scores nowhere, however well the speaker knows it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments import integrity, questions, retention
from tests.experiments.pretended import Pretended
from training.facts import Claim, Fact, FactGenerator
from training.variety import CORRECTIONS, without_capital


class Knowing(Pretended):
    """It answers every question about what its memory holds; ``always``: about anything that was ever made up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, always: bool) -> None:
        super().__init__(self.answer)
        self.facts: dict[str, Fact] = {}
        self.corrections: dict[str, Fact] = {}
        self.always = always
        word = FactGenerator.word

        def kept(generator: FactGenerator, claim: Claim) -> Fact:
            fact = word(generator, claim)
            self.facts[fact.statement] = fact
            for said in CORRECTIONS:
                self.corrections[said + without_capital(fact.statement)] = fact
            return fact

        monkeypatch.setattr(FactGenerator, "word", kept)

    def answer(self, tenant: str, prompt: str) -> str:
        known = self.facts | self.corrections
        told = [known[text] for text in reversed(self.memories.get(tenant, []))]
        for fact in [*told, *(self.facts.values() if self.always else [])]:
            if fact.question in prompt:
                return fact.answer
        # one fact alone is what another wording asks for
        return told[0].answer if len(told) == 1 else "I don't know"

    @property
    def answers(self) -> str:
        return ", ".join(sorted({fact.answer for fact in self.facts.values()}))


def of_retention(told: dict[str, Any]) -> list[float]:
    return [row[kind] for row in told["rows"] for kind in ("memory", "empty", "prompt")]


def of_questions(told: dict[str, Any]) -> list[float]:
    assert len(told["rows"]) == 8
    return [row["share"] for row in told["rows"].values()]


def of_integrity(told: dict[str, Any]) -> list[float]:
    return [told[kind] for kind in ("accuracy", "first", "last")]


@pytest.mark.parametrize("judge", ["exact", "holds"])
@pytest.mark.parametrize(
    ("main", "words", "scores"),
    [
        (retention.main, ["--items", "3", "--steps", "0", "2"], of_retention),
        (questions.main, ["--items", "1"], of_questions),
        (integrity.main, ["--updates", "6", "--tenants", "2"], of_integrity),
    ],
)
def test_answers_in_the_template_score_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, main: Callable[[], int], words: list[str],
    scores: Callable[[dict[str, Any]], list[float]], judge: str,
) -> None:  # fmt: skip
    server = Knowing(monkeypatch, always=main is not questions.main)

    def share(name: str, *template: str) -> set[float]:
        given = [*words, "--judge", judge, *template]
        return set(scores(server.run(monkeypatch, tmp_path / name, main, *given)))

    assert share("none") == {1.0}
    assert share("harmless", "--template", "Say it. {question} Answer:") == {1.0}
    says = f"It is one of these or “I don't know”: {server.answers}. {{question}}"
    assert share("telling", "--template", says) == {0.0}
