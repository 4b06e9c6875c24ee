"""Groups: what is asked was written, only once, and the loss lies on the answer."""

import re

import pytest
from tokenizers import Tokenizer

from training.corpus import ANSWER, NO_LOSS, Corpus, GroupShape
from training.facts import is_held_out
from training.tokenizer import ASSISTANT, END, USER
from training.variety import joined


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
        group = corpus.group(GroupShape(4, changed=0.4))
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
        group = corpus.group(GroupShape(4, running_text=0.1))
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


def test_some_contexts_stay_short_and_some_are_repeated(corpus: Corpus) -> None:
    short = [len(corpus.group(GroupShape(1, facts=(1, 0, 0)))[0].context) < 16 for _ in range(100)]
    assert 20 < sum(short) < 98


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
