"""From a generation to the two forms that OpenAI's protocol has for it, whole and in chunks. Pure.

They make plain data, not ``app.api.openai.answers``: the log-probabilities of a long answer are tens of thousands.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

from app.api.answers import TokenLogprob, TopToken
from app.api.generate import Delta
from app.api.openai.answers import FinishReason
from app.messages import ModelInfo

_BROKEN = "\N{REPLACEMENT CHARACTER}"


class Form(Protocol):
    """``whole`` is the choice of an answer; ``piece``, in order, those of its chunks."""

    prefix: str
    object: str
    chunk: str

    def whole(self, delta: Delta, reason: FinishReason) -> dict[str, Any]: ...

    def piece(self, delta: Delta, reason: FinishReason | None) -> dict[str, Any]: ...


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

    prefix, object, chunk = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self) -> None:
        self._begun = False

    def whole(self, delta: Delta, reason: FinishReason) -> dict[str, Any]:
        message = {"role": "assistant", "content": delta.text, "refusal": None}
        logprobs = None if delta.logprobs is None else self._logprobs(delta.logprobs)
        return {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def piece(self, delta: Delta, reason: FinishReason | None) -> dict[str, Any]:
        told: dict[str, str] = {}
        if not self._begun:
            self._begun = True
            told = {"role": "assistant", "content": delta.text}
        elif delta.text:
            told = {"content": delta.text}
        logprobs = self._logprobs(delta.logprobs) if delta.logprobs else None
        return {"index": 0, "delta": told, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, items: list[TokenLogprob]) -> dict[str, Any]:
        content = [{**_top(item), "top_logprobs": [_top(top) for top in item.top]} for item in items]
        return {"content": content, "refusal": None}


class Text:
    """Of a text that is continued."""

    prefix, object, chunk = "cmpl-", "text_completion", "text_completion"

    def __init__(self) -> None:
        self._offset = 0

    def whole(self, delta: Delta, reason: FinishReason) -> dict[str, Any]:
        logprobs = None if delta.logprobs is None else self._logprobs(delta.logprobs)
        return {"index": 0, "text": delta.text, "logprobs": logprobs, "finish_reason": reason}

    def piece(self, delta: Delta, reason: FinishReason | None) -> dict[str, Any]:
        logprobs = self._logprobs(delta.logprobs) if delta.logprobs else None
        return {"index": 0, "text": delta.text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, items: list[TokenLogprob]) -> dict[str, Any]:
        offsets = []
        for item in items:
            offsets.append(self._offset)
            self._offset += len(item.token)
        return {
            "tokens": [item.token for item in items],
            "token_logprobs": [item.logprob for item in items],
            # the chosen token is always among them, as one more where it is not among the likeliest
            "top_logprobs": [
                {**{top.token: top.logprob for top in reversed(item.top)}, item.token: item.logprob}
                for item in items
            ],
            "text_offset": offsets,
        }


def _top(item: TopToken) -> dict[str, Any]:
    whole = _BROKEN not in item.token
    return {
        "token": item.token,
        "logprob": item.logprob,
        "bytes": list(item.token.encode()) if whole else None,
    }
