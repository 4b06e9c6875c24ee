"""Groups: what is asked was written, only once, and the loss lies on the answer."""

import random
import re

import pytest
from tokenizers import Tokenizer

from training.corpus import DONT_KNOW, MAX_CONTEXT, Corpus, alike
from training.examples import ANSWER, NO_LOSS, UNKNOWN, Example, GroupShape, Key
from training.facts import Claim, is_held_out
from training.relations import NEAR, word_it
from training.tokenizer import ASSISTANT, END, USER
from training.variety import (
    ROLES,
    free_action,
    free_place,
    joined,
    sentence_of,
    terse,
    unusual_value,
    whereabouts,
    wrapped,
)


@pytest.fixture
def corpus(tokenizer: Tokenizer) -> Corpus:
    english = "the quick brown fox jumps over the lazy dog and runs away into the dark wood " * 4
    return Corpus(tokenizer, 0, 16, names=["Kingdom", "Rivers"], nouns=["harvest", "engine"], texts=[english])


def test_no_two_claims_of_a_group_contradict_each_other(corpus: Corpus) -> None:
    for colliding in (0.0, 1.0):
        for _ in range(100):
            group = corpus.claims(GroupShape(8, colliding=colliding))
            keys = [claim.key for claims in group for claim in claims]
            assert len(keys) == len(set(keys))


def test_a_changed_claim_is_asked_for_with_its_newest_value(corpus: Corpus) -> None:
    changed = asked = 0
    for _ in range(60):
        group = corpus.group(GroupShape(4, changed=0.4)).examples
        newest = {claim.key: claim for example in group for claim in example.claims}
        old = {c.value for e in group for c in e.claims if newest[c.key] is not c} - {
            c.value for c in newest.values()
        }
        changed += len(old)
        for example in group:
            answers = [
                t if k == ANSWER else corpus.user for t, k in zip(example.row, example.kinds, strict=True)
            ]
            text = corpus.tokenizer.decode(answers, skip_special_tokens=False)
            asked += any(f"{USER} {claim.value}{END}" in text for claim in newest.values())
            for value in old:
                assert f"{USER} {value}{END}" not in text
    assert changed > 20
    assert asked == 240


def test_a_colliding_group_has_at_most_three_relations(corpus: Corpus) -> None:
    for _ in range(50):
        group = corpus.claims(GroupShape(6, colliding=1.0))
        assert len({claim.relation.name for claims in group for claim in claims}) <= 3


def test_training_names_and_values_are_not_held_out(corpus: Corpus) -> None:
    for _ in range(100):
        for claims in corpus.claims(GroupShape(4)):
            for claim in claims:
                unusual = re.search(r"Kingdom|Rivers|harvest|engine", claim.value)
                if claim.relation.kind == "word" and not unusual:
                    assert not is_held_out(claim.value)


def test_answers_are_a_value_of_the_group_and_an_end(corpus: Corpus) -> None:
    end = corpus.end
    for _ in range(50):
        group = corpus.group(GroupShape(4, running_text=0.1)).examples
        values = {claim.value for example in group for claim in example.claims}
        for example in group:
            assert len(example.row) == len(example.kinds)
            assert example.kinds[0] == NO_LOSS
            answer: list[int] = []
            for token, kind in zip(example.row, example.kinds, strict=True):
                if kind == ANSWER:
                    answer.append(token)
                    if token == end:
                        assert corpus.tokenizer.decode(answer[:-1]).strip() in values
                        answer = []
            assert answer == []


def refused(corpus: Corpus, example: Example) -> list[str]:
    """What the row asks for and nothing answers."""
    asked, question = [], 0
    for place, kind in enumerate(example.kinds):
        begins = kind == UNKNOWN and example.kinds[place - 1] != UNKNOWN
        if begins:
            asked.append(corpus.tokenizer.decode(example.row[question:place]).strip())
        if example.row[place] == corpus.end:
            question = place + 1
    return asked


def test_what_is_refused_is_told_nowhere_in_the_pool(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each refused question is one of the relation and name that was drawn for it, and these stand in no context."""
    drawn: list[Claim] = []
    draw = corpus._unknown

    def kept(told: list[Claim], elsewhere: frozenset[Key]) -> Claim:
        drawn.append(draw(told, elsewhere))
        return drawn[-1]

    monkeypatch.setattr(corpus, "_unknown", kept)
    same_relation = same_name = 0
    for _ in range(150):
        elsewhere = frozenset(
            claim.key for claims in corpus.claims(GroupShape(20, first_person=0.9)) for claim in claims
        )
        drawn.clear()
        group = corpus.group(GroupShape(4, unknown=0.8, changed=0.1), elsewhere)
        told = {claim.key for example in group.examples for claim in example.claims}
        assert len(drawn) == sum(len(refused(corpus, example)) for example in group.examples)
        for claim in drawn:
            for relation, name in told | elsewhere:
                assert relation not in NEAR.get(claim.relation.name, {claim.relation.name}) or not alike(
                    claim.name, name
                )
            same_relation += claim.relation.name in {relation for relation, _ in told}
            same_name += claim.name is not None and claim.name in {name for _, name in told}
    assert same_relation > 100
    assert same_name > 100


def answered(corpus: Corpus, example: Example) -> list[tuple[str, str]]:
    """What stands in the row before each answer that is no refusal, and the answer."""
    found, question = [], 0
    for place, kind in enumerate(example.kinds):
        if kind == ANSWER and example.kinds[place - 1] != ANSWER:
            stop = example.row.index(corpus.end, place)
            decoded = (
                corpus.tokenizer.decode(ids) for ids in (example.row[question:place], example.row[place:stop])
            )
            asked, answer = decoded
            found.append((asked.strip(), answer.strip()))
        if example.row[place] == corpus.end:
            question = place + 1
    return found


def test_a_group_that_is_not_told_asks_only_for_what_nobody_or_the_prompt_knows(corpus: Corpus) -> None:
    asides = 0
    for _ in range(40):
        group = corpus.group(GroupShape(4, untold=1.0, in_prompt=1.0))
        assert not group.told
        for example in group.examples:
            assert refused(corpus, example)
            for asked, answer in answered(corpus, example):
                assert answer in asked
                asides += 1
            text = corpus.tokenizer.decode(example.row)
            assert not any(claim.question(corpus.rng) in text for claim in example.claims)
    assert 20 < asides < 100
    assert corpus.group(GroupShape(4)).told


def test_what_only_a_prompt_tells_is_told_nowhere_in_the_pool(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the texts in a prompt are the row's own context; the others must be read and not remembered."""
    drawn: list[list[Claim]] = []
    draw = corpus._aside

    def kept(keys: frozenset[Key]) -> list[Claim]:
        drawn.append(draw(keys))
        return drawn[-1]

    monkeypatch.setattr(corpus, "_aside", kept)
    read = 0
    for _ in range(60):
        elsewhere = corpus.claims(GroupShape(20, colliding=0.0, first_person=0.9))
        keys = frozenset(claim.key for claims in elsewhere for claim in claims)
        for example in corpus.group(GroupShape(4, in_prompt=1.0), keys).examples:
            first = next(place for place, kind in enumerate(example.kinds) if kind == ANSWER)
            if example.told_in[first] < 0:
                read += 1
                aside = drawn.pop(0)
                asked, answer = answered(corpus, example)[0]
                assert answer == aside[0].value
                assert answer in asked
                assert not keys & {claim.key for claim in aside}
        assert drawn == []
    assert 80 < read < 160


def test_the_answer_to_an_unknown_question_is_always_the_same(corpus: Corpus) -> None:
    for _ in range(30):
        for example in corpus.group(GroupShape(4, unknown=1.0)).examples:
            answer = [t for t, k in zip(example.row, example.kinds, strict=True) if k == UNKNOWN]
            assert corpus.tokenizer.decode(answer, skip_special_tokens=False).strip() == f"{DONT_KNOW}{END}"


def test_every_answer_knows_the_context_it_was_told_in(corpus: Corpus) -> None:
    for _ in range(50):
        group = corpus.group(GroupShape(4, unknown=0.3, changed=0.2)).examples
        for example in group:
            assert len(example.told_in) == len(example.row)
            for place, block in enumerate(example.told_in):
                assert (block >= 0) == (example.kinds[place] == ANSWER)
                if block >= 0 and example.told_in[place - 1] < 0:
                    stop = example.row.index(corpus.end, place)
                    answer = corpus.tokenizer.decode(example.row[place:stop]).strip()
                    assert answer in {claim.value for claim in group[block].claims}


def test_an_answer_stands_in_the_context_it_is_asked_from(corpus: Corpus) -> None:
    """Claims that do not fit into a context are dropped rather than asked for."""
    for _ in range(100):
        for example in corpus.group(GroupShape(2, facts=(0, 0, 1))).examples:
            assert len(example.context) <= MAX_CONTEXT
            text = corpus.tokenizer.decode(example.context)
            for claim in example.claims:
                assert claim.value in text


def test_names_that_share_a_word_may_mean_the_same_person() -> None:
    assert alike("Anna", "Anna Tolvan")
    assert alike(None, None)
    assert not alike("Anna", "Annabel")
    assert not alike("Anna", None)
    assert alike("our boss", "the boss")
    assert not alike("my sister", "my brother")
    assert not alike("my sister", None)


def test_some_contexts_stay_short_and_some_are_repeated(corpus: Corpus) -> None:
    one = GroupShape(1, facts=(1, 0, 0))
    short = [len(corpus.group(one).examples[0].context) < 16 for _ in range(100)]
    assert 5 < sum(short) < 98


def test_a_text_has_the_same_pieces_alone_and_after_another(tokenizer: Tokenizer) -> None:
    one, two = "Mira Tolvan lives in Tarnovik.", "My code is K7-492."
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids  # noqa: E731
    assert encode(f"{one} {two}") == encode(one) + encode(two)
    marked = encode(f"{USER}{one}{ASSISTANT}")
    assert marked[1:-1] == encode(one)


def test_any_unicode_survives_the_tokenizer(tokenizer: Tokenizer) -> None:
    for text in ("Zoë lives in Łódź.", "日本語 ✓ 🦊", "tab\tand\nline"):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids).strip() == text


def test_digits_are_single_tokens(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("at 14:35", add_special_tokens=False).tokens
    assert [token for token in tokens if any(letter.isdigit() for letter in token)] == ["1", "4", "3", "5"]
    assert tokenizer.token_to_id(END) is not None


def test_joined_sentences_keep_the_capitals_of_names() -> None:
    assert joined(["Anna lives in Tolva.", "My dog is called Rex.", "I drive a Zan."]) == (
        "Anna lives in Tolva and my dog is called Rex and I drive a Zan."
    )


def test_a_question_in_a_roundabout_way_still_names_what_it_asks_for() -> None:
    rng = random.Random(0)
    told = {wrapped(rng, "Who is Anna's dentist?") for _ in range(200)}
    assert len(told) > 10
    assert all("Anna's dentist" in text for text in told)
    assert any(text.startswith("Anna's dentist") for text in told)
    assert not any("what" in text.lower() for text in told - {"What did I say about Anna's dentist?"})
    assert {"The PIN of Leo?", "Give me the PIN of Leo."} <= {
        wrapped(rng, "Tell me the PIN of Leo.") for _ in range(200)
    }
    for other in ("Where does Anna live?", "What is Anna's dog called?", "How old is Leo?"):
        assert wrapped(rng, other) == other


def test_a_sentence_of_a_text_is_whole_and_neither_long_nor_short() -> None:
    text = (
        "It rained. He went home and read a book until it was late. "
        + "So " * 30
        + "on. She slept well that night"
    )
    drawn = {sentence_of(random.Random(seed), text) for seed in range(100)}
    assert drawn == {None, "He went home and read a book until it was late.", "She slept well that night."}


def test_people_without_a_name_begin_a_sentence_with_a_capital(corpus: Corpus) -> None:
    found = 0
    for _ in range(400):
        claim = corpus.claims(GroupShape(1, facts=(1, 0, 0), first_person=0.0))[0][0]
        if claim.name and claim.name.split()[0] in ("my", "our", "the"):
            found += 1
            assert claim.name.split(" ", 1)[1] in ROLES
            text = corpus._statement([claim], False)
            assert text[0].isupper()
            assert claim.name.casefold() in text.replace("neighbor", "neighbour").casefold()
            assert corpus._question(claim)
    assert 5 < found < 80


def test_free_relations_name_what_they_are_about_in_every_wording() -> None:
    rng = random.Random(1)
    nouns = ["harvest", "engine", "lamp"]
    for _ in range(300):
        relation = rng.choice([free_action(rng), free_place(rng, nouns, ["red"])])
        name = None if relation.subject == "none" else rng.choice([None, "Anna"])
        assert len(relation.name.split()) >= 3
        for statement in relation.statements:
            said = word_it(statement, name)
            assert said.count("{v}") == 1
            assert said.endswith(".")
            assert not set("[]|") & set(said.replace("{v}", ""))
            assert name is None or name in said
        for question in relation.questions:
            asked = word_it(question, name)
            assert asked.endswith("?")
            assert not set("[]|{}") & set(asked)
            assert name is None or name in asked
    assert whereabouts(random.Random(2), nouns).split()[-1] in [*nouns, *map(str, range(41))]


def test_values_of_several_words_are_told_and_asked_for_whole(corpus: Corpus) -> None:
    rng = random.Random(3)
    drawn = [unusual_value(rng, "word", corpus.names, corpus.nouns) for _ in range(300)]
    assert any(len(value.split()) == 3 and value[0].isdigit() for value in drawn if value)
    codes = [unusual_value(rng, "code", corpus.names, corpus.nouns) or "" for _ in range(100)]
    assert all(4 <= sum(letter.isdigit() for letter in code) <= 8 for code in codes)


def test_a_terse_question_keeps_what_it_is_about_and_in_its_order() -> None:
    question = "Could you tell me the name of the dog of Anna in Of?"
    told = {terse(random.Random(seed), question) for seed in range(200)}
    assert len(told) > 50
    for text in told:
        kept = iter(question.split())
        assert all(word in kept for word in text.split())
        assert [word for word in text.split() if word in ("name", "dog", "Anna")] == ["name", "dog", "Anna"]
    assert terse(random.Random(0), "Who is he?") == "Who is he?"
