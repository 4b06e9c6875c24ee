"""Cuts a long text into the contexts of an update: even pieces, at sentence ends where there are any.

Every context becomes one block of memory, so its size matters twice: the model was trained for contexts of
``min_context`` to ``max_context`` tokens, and each block pushes out as much as it brings, however little it says.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from app.api.tokens import Encoded
from app.errors import ContextTooShort
from app.messages import Context

Encode = Callable[[str], Encoded]

_CLOSING = "\"'”’»)]}」』"
_ENDS = ".!?…"
_PAUSES = ",;:—–"
# no pattern here may try a stretch of text twice: texts of megabytes are the caller's to choose
_SPACE = re.compile(r"\s+")
_WIDE_END = re.compile(rf"[。！？][{re.escape(_CLOSING)}]{{0,4}}")
_WIDE_PAUSE = re.compile(r"[、，；：]")
# a full stop after these ends no sentence: titles, initials
_ABBREVIATION = re.compile(r"(?:^|[\s(\"'])(?:Mr|Mrs|Ms|Dr|Prof|St|Sr|Jr|vs|etc|e\.g|i\.e|[A-Z])\.$")
# with more pieces than this to go, each is chosen for itself
_FAR = 4
_SKIN_TONES = frozenset(map(chr, range(0x1F3FB, 0x1F400)))
_JOINER = "\N{ZERO WIDTH JOINER}"


@dataclass(frozen=True)
class Sizes:
    """Tokens per context: at least ``least``, at most ``most``; ``repeated`` is what repetition aims for."""

    least: int
    most: int
    repeated: int

    @property
    def full(self) -> int:
        """What a text is repeated to."""
        return min(max(self.least, self.repeated), self.most)


def cut_text(text: str, sizes: Sizes, encode: Encode) -> list[Context]:
    """Contexts whose texts, joined, are ``text``; each has ``sizes.least`` to ``sizes.most`` tokens.

    A text that has fewer is one context all the same; the caller decides what becomes of it. Whitespace at a
    cut belongs to the piece before it and is not among its tokens, so that each piece begins and ends as
    a text of its own would. (If ``most`` is less than twice ``least``, some lengths can only be cut smaller.)
    """
    whole = encode(text)
    if len(whole.tokens) <= sizes.most:
        return [Context(whole.tokens, text)]
    least = min(sizes.least, sizes.most // 2)
    cuts = _Cuts(text, whole.starts)
    contexts: list[Context] = []
    begin = 0
    while begin < len(text):
        piece = _next_piece(text, begin, cuts, encode, least, sizes.most)
        contexts.append(piece)
        begin += len(piece.text or "")
    return contexts


def cut_tokens(tokens: Sequence[int], sizes: Sizes) -> list[Context]:
    """Token ids say nothing about sentences: as few even pieces as there can be."""
    count = max(1, -(-len(tokens) // sizes.most))
    edges = [len(tokens) * piece // count for piece in range(count + 1)]
    return [Context(list(tokens[a:b])) for a, b in pairwise(edges)]


def repeat_text(text: str, tokens: Sequence[int], sizes: Sizes, encode: Encode) -> Context:
    """``text`` again and again, a space between, until it has enough tokens to be remembered."""
    aim = sizes.full
    each = max(1, len(encode(f"{text} {text}").tokens) - len(tokens))
    times = 1 + -(-max(0, aim - len(tokens)) // each)
    repeated = encode(" ".join([text] * times)).tokens
    while len(repeated) < sizes.least:
        times *= 2
        repeated = encode(" ".join([text] * times)).tokens
    return Context(repeated[: sizes.most], text)


def repeat_tokens(tokens: Sequence[int], sizes: Sizes) -> Context:
    times = -(-sizes.full // len(tokens))
    return Context((list(tokens) * times)[: sizes.most])


def too_short(tokens: int, sizes: Sizes, param: str) -> ContextTooShort:
    return ContextTooShort(
        f"the text has {tokens} tokens, and this model's contexts have at least {sizes.least}: a shorter one "
        'would disturb the memory; send more, or "short": "repeat" to have it repeated',
        param=param,
    )


class _Cuts:
    """Where a text may be cut, best kind first; positions in characters, distances in tokens."""

    def __init__(self, text: str, starts: list[int]) -> None:
        self.starts = starts
        sentences = [m.end() for m in _WIDE_END.finditer(text)]
        clauses = [m.end() for m in _WIDE_PAUSE.finditer(text)]
        spaces = []
        for gap in _SPACE.finditer(text):
            spaces.append(gap.end())
            before = text[max(0, gap.start() - 12) : gap.start()].rstrip(_CLOSING)
            if "\n" in gap.group() or _ends_sentence(before, text[gap.end() : gap.end() + 1]):
                sentences.append(gap.end())
            elif before.endswith(tuple(_PAUSES)):
                clauses.append(gap.end())
        self.kinds = [
            sorted(sentences),
            sorted(clauses),
            spaces,
            [s for s in sorted(set(starts)) if not _joined(text, s)],
            sorted(set(starts)),
        ]

    def token(self, position: int) -> int:
        """The number of tokens that begin before ``position``."""
        return bisect_left(self.starts, position)

    def position(self, token: int) -> int:
        return self.starts[min(token, len(self.starts) - 1)]

    def best(self, first: int, last: int, ideal: int, kinds: slice) -> int | None:
        """The cut nearest to token ``ideal`` in tokens [first, last], of the best kind that has one there."""
        low, high = self.position(first), self.position(last)
        for places in self.kinds[kinds]:
            inside = places[bisect_left(places, low) : bisect_right(places, high)]
            if inside:
                wanted = self.position(ideal)
                return min(inside, key=lambda place: abs(place - wanted))
        return None


def _next_piece(text: str, begin: int, cuts: _Cuts, encode: Encode, least: int, most: int) -> Context:
    rest = text[begin:]
    first = cuts.token(begin)
    left = len(cuts.starts) - first
    if left <= most + most // 8:
        tokens = encode(rest).tokens
        if len(tokens) <= most:
            return Context(tokens, rest)
        left = max(left, len(tokens))
    end = _choose(cuts, first, left, least, most)
    while True:
        piece = text[begin:end]
        tokens = _own_tokens(piece, encode, least)
        if len(tokens) <= most or end - begin <= 1:
            return Context(tokens, piece)
        # tokens at a cut differ from those in the whole text; where that makes the piece too long, cut sooner
        over = len(tokens) - most
        wanted = max(first + 1, cuts.token(end) - over - 1)
        sooner = cuts.best(max(first + 1, wanted - 8), wanted, wanted, slice(2, None))
        if sooner is None or not begin < sooner < end:
            sooner = begin + max(1, (end - begin) * most // len(tokens) - 1)
        end = sooner


def _own_tokens(piece: str, encode: Encode, least: int) -> list[int]:
    stripped = piece.rstrip()
    tokens = encode(stripped).tokens if stripped else []
    return tokens if len(tokens) >= least else encode(piece).tokens


def _choose(cuts: _Cuts, first: int, left: int, least: int, most: int) -> int:
    """Where the next piece ends: pieces as even as sentence ends allow, a piece more rather than half a sentence."""
    # fresh tokenisation may make a piece a little longer than it is in the whole text
    slack = min(4, (most - least) // 4)
    fewest = -(-left // most)
    if fewest > _FAR:
        # the end is too far off to matter
        ranges = [(max(least + slack, most // 3), most - 1, left // fewest)]
    else:
        ranges = []
        for count in range(fewest, 2 * fewest + 2):
            ideal, others = left // count, count - 1
            low = max(least + slack, left - others * (most - slack), ideal // 2)
            high = min(most - 1, left - others * (least + slack), ideal + ideal // 2)
            ranges.append((low, high, ideal))
    for kinds in (slice(0, 1), slice(1, 2), slice(2, 3), slice(3, None)):
        for low, high, ideal in ranges:
            if low <= high:
                place = cuts.best(first + low, first + high, first + ideal, kinds)
                if place is not None:
                    return place
    return cuts.position(first + max(1, min(most - 1, left // 2)))


def _ends_sentence(before: str, following: str) -> bool:
    """Whether a sentence ends between the word ``before`` a gap and the character ``following`` it."""
    if before.endswith(".") and not before.endswith(".."):
        return not following.islower() and not _ABBREVIATION.search(before)
    return before.endswith(tuple(_ENDS))


def _joined(text: str, position: int) -> bool:
    """Whether a cut here would tear a character from its accent or an emoji from its parts."""
    if not 0 < position < len(text):
        return False
    after, before = text[position], text[position - 1]
    return unicodedata.category(after).startswith("M") or after in _SKIN_TONES or _JOINER in (after, before)
