"""From what the caller sent to tokens that the model can take, or an error before anything reaches a worker."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from app.api.chat import ChatMessage
from app.api.schemas import Message
from app.api.tokens import INLINE_CHARS, Tokenizer, check_tokens, in_thread, need
from app.errors import InvalidRequest, TooManyTokens
from app.messages import ModelInfo


def conversation(messages: Sequence[Message]) -> list[ChatMessage]:
    return [{"role": message.role, "content": message.content} for message in messages]


async def render(tokenizer: Tokenizer, messages: Sequence[Message], *, prompt: bool) -> str:
    """The messages in the model's chat format; long ones are rendered in a thread."""
    chat = conversation(messages)
    if sum(len(message["content"]) for message in chat) + 64 * len(chat) <= INLINE_CHARS:
        return tokenizer.chat(chat, prompt=prompt)
    return await asyncio.to_thread(tokenizer.chat, chat, prompt=prompt)


async def prompt_tokens(
    model: ModelInfo,
    tokenizer: Tokenizer | None,
    prompt: str | list[int] | None,
    messages: Sequence[Message] | None,
    max_tokens: int,
) -> list[int]:
    """Raises TooManyTokens if prompt and completion are longer than the model's longest sequence."""
    param = "prompt" if messages is None else "messages"
    if isinstance(prompt, list):
        tokens = prompt
    else:
        known = need(tokenizer, param)
        text = prompt if prompt is not None else await render(known, messages or [], prompt=True)
        tokens = await in_thread(known, text, model.max_sequence, param)
    check_tokens(tokens, model.vocab_size, param)
    if not tokens:
        raise InvalidRequest("the prompt has no tokens", param=param)
    if len(tokens) + max_tokens > model.max_sequence:
        raise TooManyTokens(
            f"a prompt of {len(tokens):,} tokens and {max_tokens:,} to generate are more than the "
            f"{model.max_sequence:,} that a sequence can have",
            param=param,
        )
    return tokens


async def scored_tokens(
    model: ModelInfo, tokenizer: Tokenizer | None, prompt: str | list[int], continuation: str | list[int]
) -> tuple[list[int], list[int]]:
    """Prompt and continuation. Two strings are tokenised as one text where a token ends between them."""
    if isinstance(prompt, str) and isinstance(continuation, str):
        known = need(tokenizer, "prompt")
        before = await in_thread(known, prompt, model.max_sequence, "prompt")
        both = await in_thread(known, prompt + continuation, model.max_sequence, "continuation")
        if both[: len(before)] == before:
            after = both[len(before) :]
        else:
            after = await in_thread(known, continuation, model.max_sequence, "continuation")
    else:
        before = await _tokens(model, tokenizer, prompt, "prompt")
        after = await _tokens(model, tokenizer, continuation, "continuation")
    for tokens, param in ((before, "prompt"), (after, "continuation")):
        check_tokens(tokens, model.vocab_size, param)
        if not tokens:
            raise InvalidRequest(f"the {param} has no tokens", param=param)
    if len(before) + len(after) > model.max_sequence:
        raise TooManyTokens(
            f"prompt and continuation have {len(before) + len(after):,} tokens, more than the "
            f"{model.max_sequence:,} that a sequence can have",
            param="continuation",
        )
    return before, after


async def _tokens(
    model: ModelInfo, tokenizer: Tokenizer | None, given: str | list[int], param: str
) -> list[int]:
    if isinstance(given, list):
        return given
    return await in_thread(need(tokenizer, param), given, model.max_sequence, param)
