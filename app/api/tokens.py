"""Text to tokens and back, without torch: the checkpoint's tokenizer.json, its chat template, its special tokens.

``transformers`` would do the same but imports torch, which costs the API process seconds and hundreds of
megabytes. A checkpoint whose tokenizer is in another form is refused by the worker (``app.model.checkpoint``).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from app.api.chat import ChatMessage, ChatTemplate
from app.errors import InvalidRequest, NoTokenizer, TooManyTokens

# encoded at a time, so that an over-long text is refused before all of it is encoded
PIECE_CHARS = 1 << 15
# shorter texts are encoded in the loop: a thread would cost more than they do
INLINE_CHARS = 4096


@dataclass(frozen=True)
class Encoded:
    """Tokens of a text, and where each begins in it (characters)."""

    tokens: list[int]
    starts: list[int]


class Tokenizer:
    """A checkpoint's tokenizer. Its methods are pure; they may run in any thread."""

    def __init__(
        self,
        backend: Any,
        *,
        template: ChatTemplate | None = None,
        bos: str | None = None,
    ) -> None:
        self._backend = backend
        self._template = template
        self._bos = bos

    @classmethod
    def load(cls, directory: str | Path) -> Tokenizer | None:
        """The tokenizer in ``directory``, or None if there is none. Raises ValueError if it cannot be read."""
        path = Path(directory)
        config = _read_json(path / "tokenizer_config.json")
        if not (path / "tokenizer.json").is_file():
            return None
        try:
            backend: Any = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
        except Exception as error:  # the Rust side raises bare Exception
            raise ValueError(f"{path / 'tokenizer.json'} cannot be read: {error}") from error
        backend.no_padding()
        backend.no_truncation()
        special = _special_tokens(config, _read_json(path / "special_tokens_map.json"))
        source = _template_source(path, config)
        template = ChatTemplate(source, special) if source is not None else None
        return cls(backend, template=template, bos=special.get("bos_token"))

    # ------------------------------------------------------------ text -> tokens

    def encode(self, text: str, limit: int | None = None, param: str = "text") -> Encoded:
        """Tokens of ``text``, no BOS added. Raises TooManyTokens as soon as there are more than ``limit``."""
        tokens: list[int] = []
        starts: list[int] = []
        for begin, end in _pieces(text):
            encoding = self._backend.encode(text[begin:end], add_special_tokens=False)
            tokens += encoding.ids
            starts += [begin + start for start, _ in encoding.offsets]
            if limit is not None and len(tokens) > limit:
                raise TooManyTokens(f"more than the {limit:,} tokens that are allowed", param=param)
        return Encoded(tokens, starts)

    def ids(self, text: str, limit: int | None = None, param: str = "text") -> list[int]:
        return self.encode(text, limit, param).tokens

    def chat(self, messages: Sequence[ChatMessage], *, prompt: bool) -> str:
        """The messages in the model's own format, without a leading BOS; ``prompt`` opens the answer's turn.

        Raises InvalidRequest without a template, or if the template refuses the messages.
        """
        if self._template is None:
            raise InvalidRequest("this model has no chat template; send text instead", param="messages")
        text = self._template.render(messages, add_generation_prompt=prompt)
        return text.removeprefix(self._bos) if self._bos else text

    # ------------------------------------------------------------ tokens -> text

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of ``tokens``, special tokens left out."""
        text: str = self._backend.decode(list(tokens), skip_special_tokens=True)
        return text

    def word(self, token: int) -> str:
        """One token for a person to look at, special tokens included."""
        text: str = self._backend.decode([token], skip_special_tokens=False)
        return text


async def in_thread(tokenizer: Tokenizer, text: str, limit: int, param: str) -> list[int]:
    """``tokenizer.ids`` without holding up the loop."""
    if len(text) <= INLINE_CHARS:
        return tokenizer.ids(text, limit, param)
    return await asyncio.to_thread(tokenizer.ids, text, limit, param)


def need(tokenizer: Tokenizer | None, param: str) -> Tokenizer:
    """Raises NoTokenizer where text was sent to a checkpoint that has none."""
    if tokenizer is None:
        raise NoTokenizer("this model has no tokenizer: send token ids", param=param)
    return tokenizer


def check_tokens(tokens: Sequence[int], vocab_size: int, param: str) -> None:
    """Raises InvalidRequest unless every id is in the vocabulary."""
    if tokens and (min(tokens) < 0 or max(tokens) >= vocab_size):
        raise InvalidRequest(f"token ids must be at least 0 and below {vocab_size}", param=param)


def _pieces(text: str) -> Iterator[tuple[int, int]]:
    """Stretches of about PIECE_CHARS characters that begin, where possible, at a space, as words do."""
    begin = 0
    while len(text) - begin > PIECE_CHARS:
        low, high = begin + PIECE_CHARS // 2, begin + PIECE_CHARS
        end = max(text.rfind(" ", low, high), text.rfind("\n", low, high))
        if end < 0:
            end = high
        yield begin, end
        begin = end
    yield begin, len(text)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    return value if isinstance(value, dict) else {}


def _special_tokens(*sources: dict[str, Any]) -> dict[str, str]:
    """``bos_token`` and so on; each is a string or an added-token object in the files."""
    special: dict[str, str] = {}
    for source in sources:
        for name, value in source.items():
            if name.endswith("_token") and name not in special:
                content = value.get("content") if isinstance(value, dict) else value
                if isinstance(content, str):
                    special[name] = content
    return special


def _template_source(path: Path, config: dict[str, Any]) -> str | None:
    """The template file if there is one, else the one in tokenizer_config.json (the "default" of several)."""
    file = path / "chat_template.jinja"
    if file.is_file():
        return file.read_text("utf-8")
    value = config.get("chat_template")
    if isinstance(value, list):
        named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None
