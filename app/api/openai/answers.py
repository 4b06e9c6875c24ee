"""What is answered in OpenAI's protocol. ``memory_version`` is this server's own: what the whole generation read."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from app.api.answers import Usage

FinishReason = Literal["stop", "length"]


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None = Field(description="of the token in UTF-8; null: it is no whole characters")


class ChatLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatLogprob]
    refusal: None = None


class Logprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int] = Field(description="where each begins, the tokens written one after another")


class ChatMessageAnswer(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int = 0
    message: ChatMessageAnswer
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class TextChoice(BaseModel):
    index: int = 0
    text: str
    logprobs: Logprobs | None
    finish_reason: FinishReason


class CompletionHead(BaseModel):
    id: str
    created: int = Field(description="Unix seconds")
    model: str
    system_fingerprint: str = Field(description="the model's: other weights or another config, another one")


class ChatCompletion(CompletionHead):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: Usage
    memory_version: int


class TextCompletion(CompletionHead):
    object: Literal["text_completion"] = "text_completion"
    choices: list[TextChoice]
    usage: Usage
    memory_version: int


class ModelAnswer(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="Unix seconds: when this server was started")
    owned_by: str = "memoryllm-serve"
    max_model_len: int = Field(description="prompt and completion together, in tokens")
    min_context: int = Field(description="tokens of the shortest context that a self-update takes")
    max_context: int = Field(
        description="tokens of the longest one: a longer text is cut into several blocks"
    )
    num_tokens: int = Field(description="memory tokens of a block, in every layer")
    num_blocks: int = Field(description="blocks that a memory holds")


class ModelsAnswer(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelAnswer]
