"""From a generation to the two forms that OpenAI's protocol has for it, whole and in chunks. Pure."""

from __future__ import annotations

import time
from typing import Any, Protocol

from app.api.answers import TokenLogprob, TopToken, Usage
from app.api.generate import Delta
from app.api.openai.answers import (
    ChatChoice,
    ChatCompletion,
    ChatLogprob,
    ChatLogprobs,
    ChatMessageAnswer,
    FinishReason,
    Logprobs,
    TextChoice,
    TextCompletion,
    TopLogprob,
)
from app.messages import ModelInfo

_BROKEN = "\N{REPLACEMENT CHARACTER}"


class Form(Protocol):
    """``whole`` is the answer; ``choice`` what a chunk has in the place of the answer's choice, in order."""

    prefix: str
    chunk: str

    def whole(
        self, head: dict[str, Any], delta: Delta, reason: FinishReason, usage: Usage, version: int
    ) -> ChatCompletion | TextCompletion: ...

    def choice(self, delta: Delta, reason: FinishReason | None) -> dict[str, Any]: ...


def head(form: Form, id: str, model: ModelInfo) -> dict[str, Any]:
    """What the answer and each of its chunks begin with."""
    return {
        "id": form.prefix + id,
        "created": int(time.time()),
        "model": model.name,
        "system_fingerprint": model.fingerprint,
    }


class Chat:
    """Of a conversation. The first chunk says whose turn it is."""

    prefix, chunk = "chatcmpl-", "chat.completion.chunk"

    def __init__(self) -> None:
        self._begun = False

    def whole(
        self, head: dict[str, Any], delta: Delta, reason: FinishReason, usage: Usage, version: int
    ) -> ChatCompletion:
        choice = ChatChoice(
            message=ChatMessageAnswer(content=delta.text),
            logprobs=None if delta.logprobs is None else _chat_logprobs(delta.logprobs),
            finish_reason=reason,
        )
        return ChatCompletion(**head, choices=[choice], usage=usage, memory_version=version)

    def choice(self, delta: Delta, reason: FinishReason | None) -> dict[str, Any]:
        told: dict[str, str] = {}
        if not self._begun:
            self._begun = True
            told = {"role": "assistant", "content": delta.text}
        elif delta.text:
            told = {"content": delta.text}
        logprobs = _chat_logprobs(delta.logprobs).model_dump() if delta.logprobs else None
        return {"index": 0, "delta": told, "logprobs": logprobs, "finish_reason": reason}


class Text:
    """Of a text that is continued."""

    prefix, chunk = "cmpl-", "text_completion"

    def __init__(self) -> None:
        self._offset = 0

    def whole(
        self, head: dict[str, Any], delta: Delta, reason: FinishReason, usage: Usage, version: int
    ) -> TextCompletion:
        choice = TextChoice(
            text=delta.text,
            logprobs=None if delta.logprobs is None else self._logprobs(delta.logprobs),
            finish_reason=reason,
        )
        return TextCompletion(**head, choices=[choice], usage=usage, memory_version=version)

    def choice(self, delta: Delta, reason: FinishReason | None) -> dict[str, Any]:
        logprobs = self._logprobs(delta.logprobs).model_dump() if delta.logprobs else None
        return {"index": 0, "text": delta.text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, items: list[TokenLogprob]) -> Logprobs:
        offsets = []
        for item in items:
            offsets.append(self._offset)
            self._offset += len(item.token)
        return Logprobs(
            tokens=[item.token for item in items],
            token_logprobs=[item.logprob for item in items],
            # the chosen token is always among them, as one more where it is not among the likeliest
            top_logprobs=[
                {**{top.token: top.logprob for top in reversed(item.top)}, item.token: item.logprob}
                for item in items
            ],
            text_offset=offsets,
        )


def _chat_logprobs(items: list[TokenLogprob]) -> ChatLogprobs:
    return ChatLogprobs(
        content=[
            ChatLogprob(**dict(_top(item)), top_logprobs=[_top(top) for top in item.top]) for item in items
        ]
    )


def _top(item: TopToken) -> TopLogprob:
    whole = _BROKEN not in item.token
    return TopLogprob(
        token=item.token, logprob=item.logprob, bytes=list(item.token.encode()) if whole else None
    )
