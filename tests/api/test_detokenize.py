"""Text as it comes: whole characters, nothing lost, stop strings found wherever token boundaries fall."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from app.api.detokenize import Detokenizer, StopStrings
from app.api.tokens import Tokenizer
from tests.api.fake_worker import VOCAB

BROKEN = "\N{REPLACEMENT CHARACTER}"
readable = st.text(st.characters(exclude_categories=("Cs",)), max_size=60)


def cut(tokens: list[int], sizes: list[int]) -> list[list[int]]:
    pieces = []
    for size in sizes:
        pieces.append(tokens[:size])
        tokens = tokens[size:]
    return [*pieces, tokens]


@given(text=readable, sizes=st.lists(st.integers(1, 5), max_size=40))
@example(text="👩‍👩‍👧 東京 é", sizes=[1] * 40)
def test_any_text_cut_anywhere_comes_out_whole(tokenizer: Tokenizer, text: str, sizes: list[int]) -> None:
    detokenizer = Detokenizer(tokenizer)
    out = [detokenizer.push(piece) for piece in cut(tokenizer.ids(text), sizes)]
    if BROKEN not in text:
        assert all(BROKEN not in piece for piece in out)
    assert "".join(out) + detokenizer.end() == text


@given(tokens=st.lists(st.integers(5, VOCAB - 150), max_size=200))
@example(tokens=[130] * 100)
def test_any_tokens_come_out_as_if_decoded_at_once(tokenizer: Tokenizer, tokens: list[int]) -> None:
    detokenizer = Detokenizer(tokenizer)
    out = "".join(detokenizer.push([token]) for token in tokens) + detokenizer.end()
    assert out == tokenizer.decode(tokens)


def test_no_more_than_a_few_tokens_are_held(tokenizer: Tokenizer) -> None:
    # a model that emits bytes that never become a character must neither fall silent nor get slower
    lone = tokenizer.ids("é")[:1]
    detokenizer = Detokenizer(tokenizer)
    for _ in range(500):
        detokenizer.push(lone)
        assert len(detokenizer._pending) <= 16
        assert len(detokenizer._context) <= 16


def test_broken_bytes_come_out_as_if_decoded_at_once(tokenizer: Tokenizer) -> None:
    # two bytes of three: together one replacement character, torn apart two
    tokens = tokenizer.ids("鬱")[:2] * 40
    assert len(tokens) == 80
    detokenizer = Detokenizer(tokenizer)
    out = "".join(detokenizer.push([token]) for token in tokens) + detokenizer.end()
    assert out == tokenizer.decode(tokens) == BROKEN * 40


@pytest.mark.parametrize("before", range(20))
def test_a_character_after_broken_bytes_is_whole(tokenizer: Tokenizer, before: int) -> None:
    whole = tokenizer.ids("鬱")
    assert len(whole) == 3
    detokenizer = Detokenizer(tokenizer)
    out = "".join(detokenizer.push([token]) for token in whole[:1] * before + whole) + detokenizer.end()
    assert out == BROKEN * before + "鬱"


def test_special_tokens_have_no_text_and_do_not_pile_up(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.push([2] * 100) == ""
    assert len(detokenizer._pending) <= 16
    assert detokenizer.push(tokenizer.ids("Lisbon")) == "Lisbon"


def test_without_tokenizer_there_is_no_text() -> None:
    detokenizer = Detokenizer(None)
    assert detokenizer.push([1, 2, 3]) == ""
    assert detokenizer.end() == ""


few = st.text(alphabet="ab", max_size=30)


def by_hand(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The stop string that is complete first, of several the longest."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(text=few, stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=4), data=st.data())
@example(text="aab", stops=["ab"], data=None)
def test_stop_strings_do_not_depend_on_how_the_text_comes(
    text: str, stops: list[str], data: st.DataObject | None
) -> None:
    search = StopStrings(stops)
    out, rest = "", text
    while rest:
        size = data.draw(st.integers(1, 4)) if data is not None else 1
        out += search.push(rest[:size])
        rest = rest[size:]
        # nothing comes out that a stop string could still take back
        assert by_hand(text, stops)[0].startswith(out)
    if search.found is None:
        out += search.end()
    assert (out, search.found) == by_hand(text, stops)


def test_only_what_may_be_a_stop_string_is_held() -> None:
    search = StopStrings(["\n\nUser:"])
    assert search.push("Lisbon.") == "Lisbon."
    assert search.push("\n") == ""
    assert search.push("\nUs") == ""
    assert search.push("e of") == "\n\nUse of"
    assert search.end() == ""
