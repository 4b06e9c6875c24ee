"""Cutting: nothing lost, every piece of a size the model was trained for, cuts where sentences end."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from app.api.contexts import Sizes, cut_text, cut_tokens, repeat_text, repeat_tokens
from app.api.tokens import Encoded, Tokenizer

SIZES = Sizes(least=4, most=32, repeated=8)
SENTENCE = "Maya moved to Lisbon and teaches the cello. "

words = st.sampled_from(
    [
        "The",
        "fox",
        "jumps",
        "Lisbon",
        "über",
        "東京は",
        "首都です。",
        "👩‍👩‍👧",
        "e.g.",
        "Dr.",
        "J.",
        "3.5",
        "a" * 90,
        "…",
        '"Yes."',
        "x\u0301",
    ]
)
gaps = st.sampled_from([" ", " ", " ", ". ", "! ", "\n", "\n\n", ", ", "; ", "   ", "", "\t", " " * 60])
texts = st.one_of(
    st.lists(st.tuples(words, gaps), min_size=1, max_size=300).map(lambda ps: "".join(w + g for w, g in ps)),
    st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1, max_size=800),
)


@given(text=texts)
@example(text=SENTENCE * 40)
@example(text="a" * 3000)
@example(text="\n" * 500)
@example(text="x" + " " * 2000 + "y")
@example(text="👩‍👩‍👧" * 100)
@example(text="." * 3000)
def test_pieces_join_to_the_text_and_have_the_right_sizes(tokenizer: Tokenizer, text: str) -> None:
    whole = tokenizer.ids(text)
    pieces = cut_text(text, SIZES, tokenizer.encode)
    assert "".join(piece.text or "" for piece in pieces) == text
    assert max(len(piece.tokens) for piece in pieces) <= SIZES.most
    if len(whole) >= SIZES.least:
        assert min(len(piece.tokens) for piece in pieces) >= SIZES.least
    for piece in pieces:
        # the tokens say what the text says, but for whitespace at a cut
        assert tokenizer.decode(piece.tokens).rstrip() == (piece.text or "").rstrip()
    # no more blocks than needed, within what sentence ends cost: each pushes out older memories
    assert len(pieces) <= -(-len(whole) // SIZES.most) * 2 + 2


@given(count=st.integers(2, 60), most=st.integers(40, 90))
def test_prose_is_cut_at_sentence_ends_into_even_pieces(tokenizer: Tokenizer, count: int, most: int) -> None:
    pieces = cut_text(SENTENCE * count, Sizes(4, most, 8), tokenizer.encode)
    assert all((piece.text or "").endswith(SENTENCE) for piece in pieces)
    lengths = [len(piece.tokens) for piece in pieces]
    if len(lengths) > 1:
        assert min(lengths) >= max(lengths) // 3


@pytest.mark.parametrize(
    ("text", "cut_after"),
    [
        ("One two three four five six seven eight. Nine ten eleven twelve thirteen.", "eight. "),
        ("One two three four five six seven eight! Nine ten eleven twelve thirteen.", "eight! "),
        ("One two three four “five six seven eight?” Nine ten eleven twelve thirteen.", "eight?” "),
        ("One two three four five six seven eight\n\nNine ten eleven twelve thirteen.", "eight\n\n"),
        ("One two three four five six Dr. Seven eight. Nine ten eleven twelve thirteen.", "eight. "),
        ("One two three four five six J. R. Seven eight. Nine ten eleven twelve thirteen.", "eight. "),
        ("One two three four five six e.g. seven eight. Nine ten eleven twelve thirteen.", "eight. "),
        ("One two three four five six vol. seven eight. Nine ten eleven twelve thirteen.", "eight. "),
        ("一二三四五六七八九十。一二三四五六七八九。", "十。"),
        ("One two three four five six seven eight, nine ten eleven twelve thirteen", "eight, "),
    ],
)
def test_where_a_cut_falls(tokenizer: Tokenizer, text: str, cut_after: str) -> None:
    most = len(tokenizer.ids(text)) * 7 // 10
    pieces = cut_text(text, Sizes(4, most, 8), tokenizer.encode)
    assert len(pieces) == 2
    assert (pieces[0].text or "").endswith(cut_after)


def test_a_character_is_never_torn(tokenizer: Tokenizer) -> None:
    # several tokens each, none of which the tokenizer has seen together
    family = "👩🏿‍🚒"
    assert len(tokenizer.ids(family)) > 4
    pieces = cut_text(family * 30, Sizes(4, 40, 8), tokenizer.encode)
    assert len(pieces) > 1
    assert all((piece.text or "").startswith("👩") and (piece.text or "").endswith("🚒") for piece in pieces)


@given(text=texts)
def test_sizes_hold_where_a_cut_adds_tokens(text: str) -> None:
    # as tokenizers do that put a space before every text, only worse
    def encode(piece: str) -> Encoded:
        return Encoded([7] * 3 + [8] * len(piece), [0] * 3 + list(range(len(piece))))

    pieces = cut_text(text, SIZES, encode)
    assert "".join(piece.text or "" for piece in pieces) == text
    assert max(len(piece.tokens) for piece in pieces) <= SIZES.most


@given(tokens=st.lists(st.integers(0, 99), min_size=4, max_size=500))
def test_token_ids_are_cut_evenly(tokens: list[int]) -> None:
    pieces = cut_tokens(tokens, SIZES)
    assert [token for piece in pieces for token in piece.tokens] == tokens
    lengths = [len(piece.tokens) for piece in pieces]
    assert max(lengths) <= SIZES.most
    assert max(lengths) - min(lengths) <= 1


@given(text=st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=30))
def test_repetition_reaches_a_block(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.ids(text)
    context = repeat_text(text, tokens, SIZES, tokenizer.encode)
    assert SIZES.least <= len(context.tokens) <= SIZES.most
    assert len(context.tokens) >= min(SIZES.repeated, SIZES.most)
    assert context.text == text
    said = tokenizer.decode(context.tokens)
    assert (f"{text} " * 40).startswith(said.rstrip("\N{REPLACEMENT CHARACTER}"))


@given(tokens=st.lists(st.integers(0, 99), min_size=1, max_size=3))
def test_repeated_token_ids(tokens: list[int]) -> None:
    repeated = repeat_tokens(tokens, SIZES).tokens
    assert len(repeated) >= SIZES.repeated
    assert repeated[: len(tokens)] == tokens
    assert len(repeated) <= SIZES.most
