"""What counts as an answer, and that neither shuffling nor a prompt that holds the answer can score."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from experiments import cases, wordings
from experiments.answers import exactly, holds, refuses
from experiments.data import Generated, Item, Shuffled, Squad
from experiments.editing import harmonic
from experiments.questions import Questions, people, summary
from experiments.session import Session
from training.facts import FactGenerator
from training.relations import RELATIONS
from training.variety import ASKED, WRAPPERS


def test_exact_and_held_answers() -> None:
    assert exactly(" Rex ", ("Rex",))
    assert not exactly("Rex and Bruno", ("Rex",))
    assert holds("It was the 308 points, I think.", ("308",))
    assert holds("the “Golden Gate”", ("golden gate",))
    assert not holds("3080 points", ("308",))
    assert not holds("anything", ("...", ""))


def test_refusals() -> None:
    assert refuses("I don't know.")
    assert refuses("Sorry, I do not know that")
    assert refuses("I don’t know")
    assert not refuses("Don Knowles")


def test_an_answer_in_the_prompt_scores_nothing() -> None:
    item = Item("Anna's dog is called Rex.", "What is Anna's dog called?", ("Rex",), exact=True)
    assert item.right("Rex", item.question)
    assert not item.right("Rex", f"Say Rex! {item.question}")
    free = Item("", item.question, ("Rex",), exact=False)
    assert free.right("It is Rex.", free.question)
    assert not free.right("It is Rex.", f"The dog is (Rex). {free.question}")


def test_a_sentence_may_name_nobody_elses_value() -> None:
    item = Item("", "What is Ann's dog called?", ("Rex Max",), exact=False, rivals=("Bruno", "Rex", "Ann"))
    assert item.right("Ann's dog is called Rex Max.", item.question)  # Rex and Ann are not others' there
    assert not item.right("It is Rex Max, or Bruno.", item.question)
    assert not item.right("It is Bruno.", item.question)


class Speaker:
    """A server that says what it is told to; ``template`` is what it is asked in."""

    def __init__(self, says: Callable[[str], str], template: str = "{question}") -> None:
        self.says, self.template = says, template

    def asked(self, question: str) -> str:
        return self.template.replace("{question}", question)

    async def ask(self, _: str, question: str, __: int) -> str:
        return self.says(question)

    async def update(self, *_: str, **__: str) -> None:
        pass


def questioner(speaker: Speaker, exact: bool) -> Questions:
    given = SimpleNamespace(max_tokens=16)
    return Questions(SimpleNamespace(client=speaker, arguments=given, exact=exact))  # type: ignore[arg-type]


def test_people_are_told_apart_in_sentences() -> None:
    facts = people(FactGenerator(5), 2)
    own = {fact.question: fact.answer for fact in facts}
    both = f"{facts[0].answer} and {facts[1].answer}"
    for exact, says, right, named in [
        (True, lambda question: own[question], 2, 0),
        (True, lambda question: f"It is {own[question]}.", 0, 0),
        (False, lambda question: f"It is {own[question]}.", 2, 0),
        (False, lambda question: f"They are {both}.", 0, 2),
        (False, lambda _: f"It is {facts[0].answer}.", 1, 1),
    ]:
        told = asyncio.run(questioner(Speaker(says), exact)._people(FactGenerator(5), "t", 2))
        (row,) = summary({"0": told}, exact)["rows"].values()
        assert (row["right"], row["another_of_them"]) == (right, named)


def test_a_refusal_that_the_prompt_asks_for_is_none() -> None:
    for template, right in (("{question}", True), ("Else say “I don't know”. {question}", False)):
        speaker = Speaker(lambda _: "I don't know.", template)
        ((_, told, *_),) = asyncio.run(questioner(speaker, True)._unknown(FactGenerator(5), "t", 1))
        assert told is right


@pytest.mark.parametrize(
    ("model", "squad", "given", "rule"),
    [
        ("pocket", None, None, "exact"), ("memoryllm-8b", None, None, "holds"), ("pocket", "s.json", None, "holds"),
        ("memoryllm-8b", None, "exact", "exact"), ("pocket", None, "holds", "holds"),
    ],
)  # fmt: skip
def test_the_rule_is_the_models(tmp_path: Path, model: str, squad: str | None, given: str, rule: str) -> None:
    async def call(*_: Any, **__: Any) -> dict[str, str]:
        return {"model": model, "fingerprint": "f", "device": "cpu", "dtype": "float32"}

    names = argparse.Namespace(results=tmp_path, name="a", fresh=False, judge=given, squad=squad)
    client = SimpleNamespace(call=call, template="{question}")
    one = Session("retention", names, client)  # type: ignore[arg-type]
    asyncio.run(one.open())
    one.log.close()
    assert one.settings["judge"] == rule
    assert one.settings["stop"] == ["\n"]
    assert one.exact is (rule == "exact")


def test_generated_items_come_again_and_differ() -> None:
    source = Generated(3)
    items = [source.item(index) for index in range(50)]
    assert items == [Generated(3).item(index) for index in range(50)]
    assert len({item.context for item in items}) == 50
    others = source.unrelated(0)
    told = [next(others) for _ in range(50)]
    assert len(set(told)) == 50
    assert not any(items[0].context == text for text in told)


def test_shuffled_answers_are_those_of_others() -> None:
    plain, shuffled = Generated(3), Shuffled(Generated(3), 200)
    remembered = [plain.item(index).answers[0] for index in range(200)]
    scored = [shuffled.item(i).right(given, shuffled.item(i).question) for i, given in enumerate(remembered)]
    assert sum(scored) <= 2
    assert all(plain.item(i).right(given, plain.item(i).question) for i, given in enumerate(remembered))


def test_unseen_wordings_are_in_no_template_of_the_training() -> None:
    known = {relation.name: relation for relation in RELATIONS}
    assert set(wordings.UNSEEN) <= set(known)
    assert len(wordings.UNSEEN) >= 60
    # nor in what training makes of a template
    for name in wordings.UNSEEN:
        made = {
            wrapper.format(r=asked[2], w=word)
            for template in known[name].questions
            if (asked := ASKED.fullmatch(template))
            for wrapper in WRAPPERS
            for word in ("who", "what")
        }
        assert not {text.casefold() for text in wordings.UNSEEN[name]} & {text.casefold() for text in made}
    used = {question for relation in RELATIONS for question in relation.questions}
    for name in wordings.UNSEEN:
        assert not set(wordings.UNSEEN[name]) & used
    generator = FactGenerator(1)
    asked = [wordings.asked_anew(fact, generator.rng) for fact in (generator.fact() for _ in range(300))]
    texts = [text for text in asked if text]
    assert len(texts) > 100
    assert not any(mark in text for text in texts for mark in "[]{}|")


def test_no_two_people_of_a_group_are_alike() -> None:
    for seed in range(20):
        facts = people(FactGenerator(seed), 8)
        assert len({fact.relation for fact in facts}) == 1
        assert len({fact.subject for fact in facts}) == len({fact.answer for fact in facts}) == 8


def squad(path: Path) -> Path:
    def paragraph(text: str, *asked: tuple[str, str]) -> dict[str, object]:
        answered = [{"question": q, "answers": [{"text": a}] if a else []} for q, a in asked]
        return {"context": text, "qas": answered}

    data = [
        {"paragraphs": [paragraph("Tea is green.", ("What is green?", "Tea"), ("Tea is?", "Tea"))]},
        {"paragraphs": [paragraph("Snow is white.", ("What is white?", "Snow"), ("Impossible?", ""))]},
        {"paragraphs": [paragraph("No question.")]},
    ]
    path.write_text(json.dumps({"data": data}))
    return path


def test_squad_files(tmp_path: Path) -> None:
    source = Squad(squad(tmp_path / "squad.json"), seed=1)
    assert source.size == 2
    for index in range(2):
        item = source.item(index)
        assert item.question in (
            "What is green?",
            "What is white?",
        )  # the one that says its answer is left out
        others = source.unrelated(index)
        assert item.context not in [next(others) for _ in range(6)]
    with pytest.raises(ValueError, match="SQuAD"):
        Squad(_file(tmp_path, {"data": [{}]}), seed=1)


def _file(folder: Path, content: object) -> Path:
    path = folder / "file.json"
    path.write_text(json.dumps(content))
    return path


ZSRE = {
    "src": "Who made it?", "rephrase": "By whom was it made?", "answers": ["Ann"], "alt": "Bob",
    "loc": "nq question: capital of peru", "loc_ans": "Lima",
}  # fmt: skip
FLAT = {
    "prompt": "It is in", "target_new": "Rome", "ground_truth": "Paris", "rephrase_prompt": "One finds it in",
    "locality_prompt": "The Louvre is in", "locality_ground_truth": "Paris",
}  # fmt: skip
NESTED = {
    "requested_rewrite": {
        "prompt": "{} is in", "subject": "It", "target_new": {"str": "Rome"}, "target_true": {"str": "Paris"},
    },
    "paraphrase_prompts": ["One finds it in"], "neighborhood_prompts": ["The Louvre is in"],
}  # fmt: skip


def test_editing_files(tmp_path: Path) -> None:
    (case,) = cases.read(_file(tmp_path, [ZSRE]), "zsre", 5, "answers").cases
    assert case.text == "Who made it? Answer: Ann"
    assert case.generalization == (cases.Probe("By whom was it made? Answer:", " Ann"),)
    assert case.specificity == (cases.Probe("capital of peru? Answer:", " Lima"),)
    assert cases.read(tmp_path / "file.json", "zsre", 5, "alt").cases[0].text.endswith("Bob")
    for record in (FLAT, NESTED):
        (case,) = cases.read(_file(tmp_path, [record, record]), "counterfact", 1, "answers").cases
        assert case.text == "It is in Rome."
        assert case.efficacy == (cases.Probe("It is in", " Rome", " Paris"),)
        assert case.specificity == (cases.Probe("The Louvre is in", " Paris", " Rome"),)
    for kind in ("zsre", "counterfact"):
        with pytest.raises(ValueError, match=kind):
            cases.read(_file(tmp_path, [{}]), kind, 1, "answers")


def test_generated_cases_ask_elsewhere_for_what_was_known() -> None:
    made = cases.generated(1, 30)
    assert made.cases == cases.generated(1, 30).cases
    for case, world in zip(made.cases, made.world_of, strict=True):
        assert case.efficacy[0].prompt != case.generalization[0].prompt
        assert case.efficacy[0].target == case.generalization[0].target
        assert case.text not in made.worlds[world]
        assert any(case.specificity[0].target.strip() in text for text in made.worlds[world])


def test_harmonic_mean() -> None:
    assert harmonic([0.998, 0.967, 0.571]) == pytest.approx(0.792, abs=5e-4)
    assert harmonic([1.0, 0.0, 1.0]) == 0.0
