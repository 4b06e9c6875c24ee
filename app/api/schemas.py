"""What the API takes: strict models that refuse unknown fields, NaN, NUL and anything that only looks right.

Errors never quote a value, and a list stops at its first fault: eight megabytes of faults get one answer.
"""

from __future__ import annotations

import unicodedata
from functools import cache
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    model_validator,
)

MAX_TENANT = 256
MAX_KEY = 256
MAX_MESSAGES = 4096
MAX_IDS = 1 << 20
MAX_STOPS = 8
MAX_STOP = 256
MAX_LOGPROBS = 20


def check_tenant(name: str) -> str:
    """Any printable Unicode, so that e-mail addresses, paths and names are tenants as they are.

    Raises ValueError for control characters, line separators, surrogates, "." and "..", which no URL can carry.
    """
    if not 1 <= len(name) <= MAX_TENANT:
        raise ValueError(f"a tenant's id has 1 to {MAX_TENANT} characters")
    if name in {".", ".."} or any(unicodedata.category(c) in {"Cc", "Cs", "Zl", "Zp"} for c in name):
        raise ValueError('a tenant\'s id has printable characters only and is neither "." nor ".."')
    return name


def no_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError("must not contain NUL")
    return text


def as_sent(value: object) -> object:
    """The text of a header in UTF-8, which comes as if it were Latin-1. Raises ValueError."""
    try:
        return value.encode("latin-1").decode() if isinstance(value, str) else value
    except UnicodeDecodeError:
        raise ValueError("the header is not UTF-8") from None


TenantId = Annotated[
    str,
    Field(min_length=1, max_length=MAX_TENANT, description="whose memory; it comes into being on first use"),
    AfterValidator(check_tenant),
]
Text = Annotated[str, Field(min_length=1), AfterValidator(no_nul)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_IDS, fail_fast=True)]
IdempotencyKey = Annotated[str, Field(min_length=1, max_length=MAX_KEY), AfterValidator(no_nul)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP), AfterValidator(no_nul)]
Short = Literal["refuse", "repeat", "fill"]
Stops = StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS, fail_fast=True)]


OwnTenant = Annotated[
    TenantId | None,
    Field(None, description="whose memory; may be left out with a key that is for one tenant"),
]


class Body(BaseModel):
    """Base of everything that is taken in."""

    model_config = ConfigDict(
        strict=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True, frozen=True
    )

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, value: Any) -> Any:
        # one error instead of one for each of a million unknown fields
        if isinstance(value, dict) and len(value) > 2 * len(cls.model_fields):
            raise ValueError(f"more fields than there are; known are {', '.join(cls.model_fields)}")
        return value


class Message(Body):
    role: Literal["system", "user", "assistant"]
    content: Text


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


class UpdateBody(Body):
    """What the tenant's memory is to take in: either ``text`` or ``messages``."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "tenant": "alice",
                    "text": "Alice's sister Maya moved to Lisbon in March and teaches the cello.",
                }
            ]
        }
    )

    tenant: OwnTenant = None
    text: Text | TokenIds | None = Field(None, description="a text, or token ids")
    messages: Messages | None = Field(None, description="a conversation, put into the model's chat format")
    idempotency_key: IdempotencyKey | None = Field(
        None, description="a retry with the same key gets the first answer and changes nothing"
    )
    short: Short = Field(
        "refuse",
        description="what to do with a text shorter than the model's contexts; "
        "with fill, one shorter than a block is repeated too",
    )
    stream: bool = Field(False, description="report progress block by block, as server-sent events")

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.text is None) == (self.messages is None):
            raise ValueError("exactly one of text and messages is needed")
        return self


class GenerateBody(Body):
    """What to answer, from the tenant's memory: either ``prompt`` or ``messages``.

    Sampling fields left out take the checkpoint's own defaults.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"tenant": "alice", "prompt": "Where does Alice's sister live?", "max_tokens": 16},
                {
                    "tenant": "alice",
                    "messages": [{"role": "user", "content": "Where does my sister live?"}],
                    "temperature": 0.7,
                    "stream": True,
                },
            ]
        }
    )

    tenant: OwnTenant = None
    prompt: Text | TokenIds | None = Field(None, description="a text, or token ids")
    messages: Messages | None = Field(None, description="a conversation that the model continues")
    max_tokens: int = Field(128, ge=1, le=2**31 - 1, description="most tokens to generate")
    temperature: float | None = Field(None, ge=0, le=100, description="0: always the likeliest token")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, lt=2**31, description="0: off")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100, description="1: off")
    seed: int | None = Field(None, ge=0, lt=2**63, description="the same seed draws the same tokens")
    stop: Stops | None = Field(None, description="texts before which the generation ends")
    logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_LOGPROBS,
        description="report each token's log-probability and this many likelier ones",
    )
    ignore_eos: bool = Field(False, description="go on past the model's own stop tokens")
    return_token_ids: bool = False
    stream: bool = Field(False, description="server-sent events")
    priority: int = Field(0, ge=-1000, le=1000, description="larger goes first within the tenant's own queue")
    timeout: float | None = Field(None, gt=0, le=86_400, description="seconds until the request is given up")

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("exactly one of prompt and messages is needed")
        return self

    @property
    def stops(self) -> list[str]:
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop


class ScoreBody(Body):
    """How likely the model finds ``continuation`` after ``prompt``, given the tenant's memory."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"tenant": "alice", "prompt": "Alice's sister lives in", "continuation": " Lisbon"},
            ]
        }
    )

    tenant: OwnTenant = None
    prompt: Text | TokenIds
    continuation: Text | TokenIds


class TenantBody(Body):
    model_config = ConfigDict(json_schema_extra={"examples": [{"id": "alice", "seed": 7}]})

    id: TenantId
    seed: int | None = Field(
        None, ge=0, lt=2**40, description="decides what is forgotten; without it, drawn from the id"
    )


Version = Annotated[int, Field(ge=0, lt=2**63)]


class ForkBody(Body):
    model_config = ConfigDict(json_schema_extra={"examples": [{"target": "alice-test", "version": 12}]})

    target: Annotated[TenantId, Field(description="the new tenant, which must not exist")]
    version: Version | None = Field(None, description="a version that is kept; without it, the current one")


class RollbackBody(Body):
    model_config = ConfigDict(json_schema_extra={"examples": [{"version": 12}]})

    version: Version = Field(description="a version that is kept; what came after it is gone for good")


class RebuildBody(Body):
    model_config = ConfigDict(json_schema_extra={"examples": [{"stream": True}]})

    force: bool = Field(False, description="also if the memory was written by the model that is served now")
    stream: bool = Field(False, description="report progress block by block, as server-sent events")


@cache
def field_names() -> frozenset[str]:
    """Every name an error may mention: fields of bodies, query parameters and headers."""
    names = {name for model in _bodies(Body) for name in model.model_fields}
    return frozenset(
        names | {"after", "limit", "before", "detail", "texts", "model", "Idempotency-Key", "X-Tenant"}
    )


def _bodies(kind: type[Body]) -> list[type[Body]]:
    return [kind, *(body for child in kind.__subclasses__() for body in _bodies(child))]
