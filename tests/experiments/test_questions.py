"""A correction is what counts, and what is called an unseen wording is asked and is none of the training's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from experiments import wordings
from experiments.questions import BETWEEN
from tests.experiments.test_scoring import Speaker, questioner
from training.facts import Claim, Fact, FactGenerator
from training.relations import RELATIONS, word_it
from training.variety import CORRECTIONS, without_capital


class Recorded(FactGenerator):
    """It keeps what it has put into words, by the statement."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.facts: dict[str, Fact] = {}

    def word(self, claim: Claim) -> Fact:
        fact = super().word(claim)
        self.facts[fact.statement] = fact
        return fact


class Listener(Speaker):
    """It keeps what it was told and asked."""

    def __init__(self, says: Callable[[str], str]) -> None:
        super().__init__(says)
        self.told: list[str] = []
        self.questions: list[str] = []

    async def ask(self, tenant: str, question: str, count: int) -> str:
        self.questions.append(question)
        return await super().ask(tenant, question, count)

    async def update(self, *given: str, **_: str) -> None:
        self.told.append(given[1])


@pytest.mark.parametrize("seed", range(5))
def test_a_correction_is_right_and_what_it_corrects_is_not(seed: int) -> None:
    for place, right in ((-1, True), (0, False)):
        stream = Recorded(seed)
        speaker = Listener(lambda _: stream.facts[speaker.told[place]].answer)  # noqa: B023 - asked within
        ((row, judged, question, answer, _),) = asyncio.run(
            questioner(speaker, True)._corrections(stream, "t", 1)
        )
        older, *between, newer = (stream.facts[text] for text in speaker.told)
        assert (older.relation, older.subject) == (newer.relation, newer.subject)
        assert older.answer != newer.answer
        assert len(between) == BETWEEN
        assert all(fact.relation != older.relation for fact in between)
        assert (row, judged, answer) == ("corrections", right, newer.answer)
        assert speaker.questions == [question] == [newer.question]


@pytest.mark.parametrize("seed", range(5))
def test_a_correction_that_says_so_begins_with_it(seed: int) -> None:
    for newest in (True, False):
        stream = Recorded(seed)

        def says(_: str) -> str:
            fact = newer_of(speaker.told[-1])  # noqa: B023 - asked within
            return fact.answer if newest else stream.facts[speaker.told[0]].answer  # noqa: B023

        def newer_of(told: str) -> Fact:
            (fact,) = (
                fact
                for fact in stream.facts.values()  # noqa: B023
                for word in CORRECTIONS
                if told == word + without_capital(fact.statement)
            )
            return fact

        speaker = Listener(says)
        ((row, judged, question, answer, _),) = asyncio.run(
            questioner(speaker, True)._said_so(stream, "t", 1)
        )
        newer = newer_of(speaker.told[-1])
        assert (row, judged) == ("corrections, said so", newest)
        assert (question, answer) == (newer.question, newer.answer)
        assert stream.facts[speaker.told[0]].relation == newer.relation
        assert len(speaker.told) == BETWEEN + 2


@pytest.mark.parametrize("seed", range(5))
def test_an_unseen_wording_is_asked_and_is_unseen(seed: int) -> None:
    def asked_of(understood: Callable[[Listener], str]) -> tuple[list[list[Any]], Listener, Fact]:
        """Of a speaker who understands but one question."""
        stream = Recorded(seed)

        def says(question: str) -> str:
            return stream.facts[speaker.told[0]].answer if question == understood(speaker) else ""

        speaker = Listener(says)
        told = asyncio.run(questioner(speaker, True)._wordings(stream, "t", 1))
        (text,) = speaker.told
        return told, speaker, stream.facts[text]

    told, speaker, fact = asked_of(lambda heard: heard.questions[0])
    usual, unseen = speaker.questions
    (relation,) = (relation for relation in RELATIONS if relation.name == fact.relation)
    trained = {word_it(template, fact.subject) for template in relation.questions}
    assert usual in trained
    assert unseen not in trained
    assert unseen in {word_it(template, fact.subject) for template in wordings.UNSEEN[fact.relation]}
    assert [line[:4] for line in told] == [
        ["used wordings", True, usual, fact.answer], ["unseen wordings", False, unseen, fact.answer],
    ]  # fmt: skip
    told, *_ = asked_of(lambda _: unseen)
    assert [line[:2] for line in told] == [["used wordings", False], ["unseen wordings", True]]
