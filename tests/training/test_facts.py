"""The generator: the split really is one, and no sentence is malformed."""

import random
import re

import pytest

from training.facts import Fact, FactGenerator
from training.relations import OPEN_KINDS, RELATIONS, Relation, word_it
from training.words import FIRST_NAMES, is_held_out, person, spell, value


def facts(held_out: bool, count: int = 3000) -> list[Fact]:
    generator = FactGenerator(3, held_out=held_out)
    return [generator.fact() for _ in range(count)]


def test_held_out_names_and_values_never_occur_in_training() -> None:
    kinds = {relation.name: relation for relation in RELATIONS}
    seen_subjects = {fact.subject for fact in facts(False)} - {None}
    seen_words = {fact.answer for fact in facts(False) if kinds[fact.relation].kind in ("word", "person")}
    for fact in facts(True):
        assert fact.subject not in seen_subjects
        if kinds[fact.relation].kind in ("word", "person"):
            assert fact.answer not in seen_words


def test_about_an_eighth_of_all_words_is_held_out() -> None:
    rng = random.Random(0)
    share = sum(is_held_out(spell(rng)) for _ in range(4000)) / 4000
    assert 0.09 < share < 0.16


@pytest.mark.parametrize("held_out", [False, True])
def test_sentences_are_well_formed(held_out: bool) -> None:
    for fact in facts(held_out):
        for text in (fact.statement, fact.question, fact.completion_prompt or "X"):
            assert text == text.strip()
            assert text[0].isupper()
            assert not re.search(r"[{}\[\]|]|  | [.?']", text), text
        assert fact.statement.endswith(".")
        assert fact.question[-1] in "?."
        assert fact.answer in fact.statement
        assert fact.answer == fact.answer.strip()


def test_the_question_does_not_contain_the_answer() -> None:
    for fact in facts(True):
        assert f" {fact.answer}?" not in fact.question
        assert fact.answer not in fact.question.replace(fact.subject or "\0", "").split()


def test_a_completed_prompt_is_a_statement_of_its_relation() -> None:
    generator = FactGenerator(4)
    for _ in range(300):
        fact = generator.fact()
        if fact.completion_prompt is None:
            continue
        relation = next(r for r in RELATIONS if r.name == fact.relation)
        wordings = {word_it(text, fact.subject).replace("{v}", fact.answer) for text in relation.statements}
        assert f"{fact.completion_prompt} {fact.answer}." in wordings


def test_same_seed_same_facts_and_other_seed_other_facts() -> None:
    first, again, other = (FactGenerator(seed).fact() for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_others_share_the_relation_and_unrelated_facts_do_not() -> None:
    generator = FactGenerator(5)
    for _ in range(300):
        fact = generator.fact()
        unrelated = generator.unrelated(fact)
        changed = generator.changed(fact)
        assert (changed.relation, changed.subject) == (fact.relation, fact.subject)
        assert changed.answer != fact.answer
        assert unrelated.relation != fact.relation
        assert unrelated.subject is not None
        if fact.subject is not None:
            other = generator.about_others(fact)
            assert other.relation == fact.relation
            assert other.subject != fact.subject
            assert other.answer != fact.answer


def test_there_are_many_relations_and_most_cannot_be_guessed() -> None:
    assert len(RELATIONS) >= 80
    assert len({relation.name for relation in RELATIONS}) == len(RELATIONS)
    assert sum(relation.kind in OPEN_KINDS for relation in RELATIONS) >= 80


@pytest.mark.parametrize("relation", RELATIONS, ids=lambda relation: relation.name)
def test_every_relation_is_said_and_asked_in_six_ways(relation: Relation) -> None:
    """In both persons if it has both, and no two relations are asked in the same words."""
    for name in ("Mira", None) if relation.has_first_person else ("Mira",):
        for templates in (relation.statements, relation.questions):
            assert len({word_it(template, name) for template in templates}) >= 6
        for template in relation.statements:
            assert word_it(template, name).count("{v}") == 1
            assert ("Mira" in word_it(template, name)) == (name is not None and relation.subject != "none")
    others = {question for other in RELATIONS if other is not relation for question in other.questions}
    assert not others & set(relation.questions)


def test_a_generator_can_be_kept_to_some_relations() -> None:
    generator = FactGenerator(
        6, relations=[relation for relation in RELATIONS if relation.name in ("dog", "job")]
    )
    facts = [generator.fact() for _ in range(100)]
    assert {fact.relation for fact in facts} == {"dog", "job"}
    assert generator.unrelated(facts[0]).relation != facts[0].relation
    closed = FactGenerator(6, relations=[relation for relation in RELATIONS if relation.name == "job"])
    assert {closed.fact().relation for _ in range(20)} == {"job"}
    with pytest.raises(ValueError, match="no relation"):
        FactGenerator(6, relations=[])


def test_every_kind_of_value_can_be_drawn() -> None:
    rng = random.Random(1)
    for kind in {relation.kind for relation in RELATIONS}:
        for _ in range(50):
            drawn = value(rng, kind, held_out=True)
            assert drawn
            assert drawn == drawn.strip()
    with pytest.raises(ValueError, match="unknown kind"):
        value(rng, "nonsense", held_out=True)


def test_a_held_out_person_is_never_a_bare_real_first_name() -> None:
    rng = random.Random(2)
    assert not {person(rng, True) for _ in range(500)} & set(FIRST_NAMES)
    assert {person(rng, False) for _ in range(500)} & set(FIRST_NAMES)
