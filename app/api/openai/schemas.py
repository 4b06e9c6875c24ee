"""What is taken in OpenAI's protocol. Its fields that would change the answer are done or refused, never passed over;
those that would not are taken and have no effect."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)

from app.api import schemas
from app.api.schemas import MAX_LOGPROBS, MAX_MESSAGES, Body, GenerateBody, Text, TokenIds, UpdateBody, no_nul

CHAT_TOKENS = 1024
"""Most tokens of a chat's answer whose caller names no number: its room is kept from the start."""
COMPLETION_TOKENS = 16
"""The same of a completion: the protocol's own default."""
MAX_PARTS = 4096
"""Text parts of all messages together, as of ``/generate`` there may be as many messages."""
MAX_METADATA = 16
MAX_FIELDS = 200
_SEEDS = 2**63


def _only(*taken: Any) -> BeforeValidator:
    """Of a field of the protocol's that this server does nothing for: ``taken`` ask for nothing. Entries are not looked
    at, of which there may be a million. Raises ValueError."""

    def check(value: Any, info: ValidationInfo) -> Any:
        if value not in taken:
            instead = "".join(f" or send {json.dumps(item)}" for item in taken)
            raise ValueError(f"this server does not support {info.field_name}: leave it out{instead}")
        return value

    return BeforeValidator(check)


def _few_entries(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > MAX_METADATA:
        raise ValueError(f"at most {MAX_METADATA} entries")
    return value


def _few_parts(value: Any) -> Any:
    """Before any is looked at. Raises ValueError for more parts in all messages than there may be."""
    if isinstance(value, list):
        contents = (item.get("content") for item in value[:MAX_MESSAGES] if isinstance(item, dict))
        if sum(len(content) for content in contents if isinstance(content, list)) > MAX_PARTS:
            raise ValueError(f"at most {MAX_PARTS:,} text parts in all messages")
    return value


Plain = Annotated[str, AfterValidator(no_nul)]
Name = Annotated[str, Field(min_length=1, max_length=256)]
Unsupported = Annotated[None, _only()]
NoItems = Annotated[list[Any] | None, _only([])]
NoEntries = Annotated[dict[str, Any] | None, _only({})]
One = Literal[1] | None
Zero = Annotated[float, Field(ge=0, le=0)] | None


def _one_prompt(value: Any) -> Any:
    """A list of one prompt is that prompt. Raises ValueError for a list of several."""
    if isinstance(value, list) and value and isinstance(value[0], str | list):
        if len(value) > 1:
            raise ValueError("one prompt at a time: send each as a request of its own, they run together")
        return value[0]
    return value


Prompt = Annotated[Text | TokenIds, BeforeValidator(_one_prompt)]


class Lenient(Body):
    """A field that is null is one that is left out: programs send all they know of."""

    @model_validator(mode="before")
    @classmethod
    def _null_is_nothing(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) <= MAX_FIELDS:
            return {name: given for name, given in value.items() if given is not None}
        return value


class TextPart(Lenient):
    type: Literal["text"]
    text: Plain
    prompt_cache_breakpoint: Any = Field(None, description="without effect")


class ChatMessage(Lenient):
    """A turn. What programs keep of an answer besides its text may come back with it, and tools and sound if empty."""

    type: Literal["text"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: Plain | Annotated[list[TextPart], Field(max_length=MAX_PARTS, fail_fast=True)]
    name: Name | None = Field(None, description="without effect")
    annotations: Any = Field(None, description="without effect, as all that follows")
    refusal: Any = None
    reasoning: Any = Field(None, description="not OpenAI's")
    reasoning_content: Any = Field(None, description="not OpenAI's")
    thinking_blocks: Any = Field(None, description="not OpenAI's")
    provider_specific_fields: Any = Field(None, description="not OpenAI's")
    tool_calls: NoItems = None
    function_call: Unsupported = None
    audio: Unsupported = None

    @property
    def plain(self) -> schemas.Message:
        """As ``/generate`` takes it: ``developer`` is the newer word for ``system``."""
        content = self.content
        if not isinstance(content, str):
            content = "\n".join(part.text for part in content)
        role = "system" if self.role == "developer" else self.role
        return schemas.Message.model_construct(role=role, content=content)


class StreamOptions(Lenient):
    include_usage: bool | None = Field(None, description="a last chunk with the usage of all")
    include_obfuscation: Literal[False] | None = None


class Remembered(Lenient):
    text: Text
    short: schemas.Short = "refuse"


class TextFormat(Lenient):
    type: Literal["text"]


class CompletionBase(Lenient):
    """What both calls take."""

    model: Name | None = Field(None, description="the served model's name; it may be left out")
    # a name only where it says whose memory: elsewhere it may be anything
    user: Annotated[Any, WithJsonSchema({"type": "string"})] = Field(
        None,
        description="whose memory, where neither the header X-Tenant nor a key that is for one tenant says so",
    )
    max_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    temperature: float | None = Field(None, ge=0, le=100, description="left out: the model's own")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, lt=2**31, description="not OpenAI's; 0: off")
    min_p: float | None = Field(None, ge=0, le=1, description="not OpenAI's")
    repetition_penalty: float | None = Field(None, gt=0, le=100, description="not OpenAI's; 1: off")
    ignore_eos: bool | None = Field(None, description="not OpenAI's: go on past the model's own stop tokens")
    seed: int | None = Field(None, ge=-_SEEDS, lt=_SEEDS)
    stop: schemas.Stops | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = Field(None, description="only with stream")

    n: One = None
    frequency_penalty: Zero = None
    presence_penalty: Zero = None
    logit_bias: NoEntries = None

    metadata: Annotated[dict[str, Any] | None, BeforeValidator(_few_entries)] = Field(
        None, description="without effect"
    )
    store: bool | None = Field(None, description="without effect: nothing is kept")
    service_tier: str | None = Field(None, description="without effect")
    safety_identifier: str | None = Field(None, description="without effect")
    prompt_cache_key: str | None = Field(None, description="without effect")
    prompt_cache_retention: Any = Field(None, description="without effect")
    prompt_cache_options: Any = Field(None, description="without effect")

    @model_validator(mode="after")
    def _streamed(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options go with stream only")
        return self

    @property
    def update(self) -> UpdateBody | None:
        """What is to be remembered first, as ``/update`` takes it."""
        return None

    @property
    def with_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def _generate(self, **more: Any) -> GenerateBody:
        # every field has been checked here
        return GenerateBody.model_construct(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            ignore_eos=bool(self.ignore_eos),
            seed=None if self.seed is None else self.seed % _SEEDS,
            stop=self.stop,
            **more,
        )


class ChatCompletionBody(CompletionBase):
    """A conversation that the model continues, from the tenant's memory."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "pocket",
                    "user": "alice",
                    "messages": [{"role": "user", "content": "Where does my sister live?"}],
                }
            ]
        }
    )

    messages: Annotated[
        list[ChatMessage],
        Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True),
        BeforeValidator(_few_parts),
    ]
    max_completion_tokens: int | None = Field(
        None,
        ge=1,
        le=2**31 - 1,
        description=f"most tokens to generate, and never more than there is room for; left out: {CHAT_TOKENS}",
    )
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="only with logprobs")

    remember: Text | Remembered | None = Field(
        None,
        description="not OpenAI's: a text that the memory takes in, durably, before the answer is generated; "
        "needs the header Idempotency-Key",
    )

    tools: NoItems = None
    tool_choice: Literal["none", "auto"] | None = None
    functions: NoItems = None
    function_call: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = Field(None, description="without effect: there are no tools")
    response_format: TextFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    reasoning_effort: Annotated[Literal["none"] | None, _only("none")] = None
    verbosity: Annotated[Literal["medium"] | None, _only("medium")] = None
    prediction: Any = Field(None, description="without effect: it would only be faster")
    audio: Unsupported = None
    moderation: Unsupported = None
    web_search_options: Unsupported = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_completion_tokens is the newer name of max_tokens: only one can be given")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs go with logprobs only")
        return self

    @property
    def update(self) -> UpdateBody | None:
        if self.remember is None:
            return None
        told = self.remember if isinstance(self.remember, Remembered) else Remembered(text=self.remember)
        return UpdateBody.model_construct(text=told.text, short=told.short)

    @property
    def generate(self) -> GenerateBody:
        return self._generate(
            messages=[message.plain for message in self.messages],
            max_tokens=self.max_completion_tokens or self.max_tokens or CHAT_TOKENS,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )


class CompletionBody(CompletionBase):
    """A text that the model continues, from the tenant's memory."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"model": "pocket", "user": "alice", "prompt": "Alice's sister lives in"}]
        }
    )

    prompt: Prompt = Field(description="a text or token ids, or a list of one such")
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    best_of: One = None
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None

    @property
    def generate(self) -> GenerateBody:
        return self._generate(
            prompt=self.prompt, max_tokens=self.max_tokens or COMPLETION_TOKENS, logprobs=self.logprobs
        )
