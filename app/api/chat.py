"""Chat templates: jinja in a sandbox, with the names that templates written for transformers expect."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn, TypedDict

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from app.errors import InvalidRequest


class ChatMessage(TypedDict):
    role: str
    content: str


class _Refused(TemplateError):
    """The template itself called ``raise_exception``; its message is its author's, not the caller's."""


def _raise_exception(message: str) -> NoReturn:
    raise _Refused(message)


def _tojson(value: object, indent: int | None = None, **_: object) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


class ChatTemplate:
    """A model's template. Raises ValueError if ``source`` is no jinja."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ValueError(f"the chat template cannot be read: {error}") from error
        self._names: dict[str, Any] = dict(special_tokens)

    def render(self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool) -> str:
        """Raises InvalidRequest if the template refuses the messages."""
        try:
            return self._template.render(
                messages=list(messages), add_generation_prompt=add_generation_prompt, **self._names
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise InvalidRequest(
                "the model's chat template does not take these messages", param="messages"
            ) from error
