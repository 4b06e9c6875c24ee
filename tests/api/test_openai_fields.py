"""Fields of OpenAI's protocol that programs send to any server: taken where they ask for nothing, named if not."""

from __future__ import annotations

from typing import Any

import pytest

from tests.api.conftest import Service
from tests.api.test_bad_input import SECRET, check_error
from tests.api.test_generate import sent
from tests.api.test_openai import ASK, BODIES, CHAT, TEXT, ask

pytestmark = pytest.mark.anyio

TURN = {"role": "assistant", "content": "In Lisbon."}


@pytest.mark.parametrize(
    "kept",
    [
        # LiteLLM, and what goes through it
        {"provider_specific_fields": {"refusal": None}, "function_call": None, "tool_calls": None},
        {"reasoning_content": "Let me see.", "thinking_blocks": [{"type": "thinking", "thinking": "?"}]},
        {"reasoning": "Let me see."},
        # OpenAI's own client
        {"refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": []},
        {"refusal": "No.", "annotations": [{"type": "url_citation"}]},
    ],
)
async def test_an_answer_comes_back_as_programs_keep_it(service: Service, kept: dict[str, Any]) -> None:
    await ask(service, CHAT, messages=[TURN, *ASK["messages"]])
    await ask(service, CHAT, messages=[TURN | kept, *ASK["messages"]])
    assert sent(service).tokens == sent(service, 1).tokens


@pytest.mark.parametrize(
    ("path", "more"),
    [
        *((path, {"prompt_cache_retention": "24h"}) for path in BODIES),
        *((path, {"prompt_cache_options": {"mode": "implicit", "ttl": "30m"}}) for path in BODIES),
        (CHAT, {"prediction": {"type": "content", "content": "In Lisbon."}}),
        (CHAT, {"reasoning_effort": "none"}),
        (CHAT, {"verbosity": "medium"}),
        (CHAT, {"logprobs": False, "top_logprobs": 0}),
        (CHAT, {"top_logprobs": 0}),
    ],
)
async def test_what_asks_for_nothing_here_is_taken(service: Service, path: str, more: dict[str, Any]) -> None:
    await ask(service, path)
    await ask(service, path, **more)
    first, other = sent(service), sent(service, 1)
    assert (first.tokens, first.sampling) == (other.tokens, other.sampling)


async def test_a_part_may_say_where_a_cache_ends(service: Service) -> None:
    part = {"type": "text", "text": "Where does she live?"}
    for more in ({}, {"prompt_cache_breakpoint": {"ttl": "30m"}}):
        await ask(service, CHAT, messages=[{"role": "user", "content": [part | more]}])
    assert sent(service).tokens == sent(service, 1).tokens


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("reasoning_effort", "high"),
        ("verbosity", "low"),
        ("verbosity", {SECRET: 1}),
        ("audio", {"voice": SECRET}),
        ("moderation", {"model": SECRET}),
        ("web_search_options", {}),
        ("tools", [{"type": "function", "function": {"name": SECRET}}]),
        ("functions", [{"name": SECRET}]),
        ("logit_bias", {SECRET: 1}),
    ],
)
async def test_what_is_not_supported_is_named(service: Service, field: str, value: Any) -> None:
    refused = await service.post(CHAT, {**ASK, field: value})
    check_error(refused, 422, "invalid_request", field)
    assert f"does not support {field}" in refused.json()["error"]["message"]
    assert service.seen == []


@pytest.mark.parametrize(
    ("field", "value"),
    [("tool_calls", [{"id": SECRET}]), ("function_call", {"name": SECRET}), ("audio", {"id": SECRET})],
)
async def test_what_is_not_supported_of_a_message_is_named(service: Service, field: str, value: Any) -> None:
    refused = await service.post(CHAT, {**ASK, "messages": [*ASK["messages"], TURN | {field: value}]})
    check_error(refused, 422, "invalid_request", f"messages.1.{field}")
    assert f"does not support {field}" in refused.json()["error"]["message"]


async def test_a_field_of_another_call_is_named(service: Service) -> None:
    for path, field in ((TEXT, "tools"), (TEXT, "reasoning_effort"), (CHAT, "suffix")):
        refused = await service.post(path, {**BODIES[path], field: SECRET})
        check_error(refused, 422, "invalid_request", field)
        assert refused.json()["error"]["message"] == f"this call does not take {field}"
    # any other is the caller's own text
    refused = await service.post(CHAT, {**ASK, SECRET: 1})
    check_error(refused, 422, "invalid_request")
    assert refused.json()["error"] | {"type": ""} == {
        "message": "unknown field",
        "type": "",
        "code": "invalid_request",
        "param": None,
    }
