"""Text from tokens as they come: whole characters only, stop strings found, constant work per token."""

from __future__ import annotations

from collections.abc import Sequence

from app.api.tokens import Tokenizer

# a character is at most four byte tokens; more that end in the replacement character are broken for good
_MOST_PENDING = 16
_BROKEN = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """Tokens in, text out; what is out is never taken back, and all of it together is the text of all tokens.

    A window of the tokens before goes into every decoding, since some tokenizers treat a text's first token
    differently. A character whose bytes are not all there yet is held back.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []
        self._pending: list[int] = []

    def push(self, tokens: Sequence[int]) -> str:
        """The text that ``tokens`` complete."""
        if self._tokenizer is None:
            return ""
        return "".join([self._push(self._tokenizer, token) for token in tokens])

    def _push(self, tokenizer: Tokenizer, token: int) -> str:
        self._pending.append(token)
        text = self._text(tokenizer, self._pending)
        if not text.endswith(_BROKEN):
            if text:
                self._emitted(len(self._pending))
            elif len(self._pending) >= _MOST_PENDING:
                # tokens without text, such as special ones, would make the window grow without end
                self._pending.clear()
            return text
        if len(self._pending) < _MOST_PENDING:
            return ""
        return self._force(tokenizer, text)

    def _force(self, tokenizer: Tokenizer, text: str) -> str:
        """Bytes that will never be a character: out with all but the few that may still begin one."""
        for keep in range(1, len(self._pending)):
            head = self._text(tokenizer, self._pending[:-keep])
            tail = tokenizer.decode([*self._pending[-keep:]])
            if head + tail == text:
                self._emitted(len(self._pending) - keep)
                return head
        self._emitted(len(self._pending))
        return text

    def _text(self, tokenizer: Tokenizer, tokens: list[int]) -> str:
        before = tokenizer.decode(self._context) if self._context else ""
        return tokenizer.decode([*self._context, *tokens])[len(before) :]

    def _emitted(self, count: int) -> None:
        self._context = self._pending[max(0, count - 4) : count]
        self._pending = self._pending[count:]

    def end(self) -> str:
        """What was held back: after the last token, a broken character is as good as it gets."""
        if self._tokenizer is None or not self._pending:
            return ""
        text = self._text(self._tokenizer, self._pending)
        self._emitted(len(self._pending))
        return text


class StopStrings:
    """Looks for stop strings in a text that comes in pieces, and holds back what may be the start of one.

    ``found`` is the stop string that ended the text: the one that is complete first, of several the longest.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max((len(stop) for stop in self._stops), default=0)
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """The text that is now certain to be before any stop string."""
        if not self._stops:
            return text
        if self.found is not None:
            return ""
        self._held += text
        best: tuple[int, int] | None = None
        for stop in self._stops:
            at = self._held.find(stop)
            if at >= 0 and (best is None or (at + len(stop), at) < best):
                best = (at + len(stop), at)
        if best is not None:
            end, start = best
            self.found = self._held[start:end]
            out, self._held = self._held[:start], ""
            return out
        keep = self._possible_start()
        cut = len(self._held) - keep
        out, self._held = self._held[:cut], self._held[cut:]
        return out

    def _possible_start(self) -> int:
        """How many characters at the end could begin a stop string."""
        for length in range(min(self._longest - 1, len(self._held)), 0, -1):
            tail = self._held[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0

    def end(self) -> str:
        """What was held back for nothing."""
        out, self._held = self._held, ""
        return out
