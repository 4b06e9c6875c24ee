"""OpenAI's protocol: /generate in another form, whose tenant may come from the header, the key or ``user``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from app.api.openai.schemas import CHAT_TOKENS, COMPLETION_TOKENS
from app.api.tokens import Tokenizer
from app.messages import Generate
from app.settings import Settings
from tests.api.conftest import Service, start_service
from tests.api.fake_worker import MAX_CONTEXT, MAX_SEQUENCE, MIN_CONTEXT, NUM_TOKENS
from tests.api.test_access import bearer, start
from tests.api.test_admission import bounded
from tests.api.test_bad_input import SECRET, check_error
from tests.api.test_generate import sent
from tests.api.test_update import events

pytestmark = pytest.mark.anyio

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
PROMPT = "She teaches the cello in Lisbon, 東京 👩‍👩‍👧. "
ASK = {"user": "alice", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 9}
GO_ON = {"user": "alice", "prompt": PROMPT, "max_tokens": 9}
BODIES = {CHAT: ASK, TEXT: GO_ON}
# what a program may send that means what leaving it out means
NOTHING = {
    "n": 1,
    "frequency_penalty": 0,
    "presence_penalty": 0.0,
    "logit_bias": {},
    "metadata": {"a": "b"},
    "store": False,
    "service_tier": "auto",
    "safety_identifier": "x",
    "prompt_cache_key": "x",
    "stream": False,
    "stream_options": None,
    "stop": [],
}
NO_TOOLS = {
    "tools": [],
    "tool_choice": "none",
    "parallel_tool_calls": True,
    "response_format": {"type": "text"},
    "modalities": ["text"],
}


@pytest.fixture
async def guarded(settings: Settings, model_dir: Path, tmp_path: Path) -> AsyncIterator[Service]:
    async for service in start(settings, model_dir, tmp_path):
        yield service


async def ask(service: Service, path: str, **body: Any) -> Any:
    response = await service.post(path, {**BODIES[path], **body})
    assert response.status_code == 200, response.text
    return response.json()


async def chunks(service: Service, path: str, **body: Any) -> list[Any]:
    response = await service.post(path, {**BODIES[path], **body, "stream": True})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    told = events(response.text)
    assert {name for name, _ in told} == {""}
    assert told[-1][1] == "[DONE]"
    return [data for _, data in told[:-1]]


# ------------------------------------------------------------ what is answered


async def test_a_chat_is_generate_in_another_form(service: Service, tokenizer: Tokenizer) -> None:
    answer = await ask(service, CHAT, max_tokens=30)
    own = await service.post("/generate", {"tenant": "alice", "messages": ASK["messages"], "max_tokens": 30})
    chat, plain = sent(service), sent(service, 1)
    assert (chat.tenant, chat.tokens, chat.sampling) == ("alice", plain.tokens, plain.sampling)
    told = own.json()
    assert answer == {
        "id": f"chatcmpl-{chat.id}",
        "object": "chat.completion",
        "created": answer["created"],
        "model": "fake",
        "system_fingerprint": "f" * 16,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": told["text"], "refusal": None},
                "logprobs": None,
                "finish_reason": "length",
            }
        ],
        "usage": told["usage"],
        "memory_version": 0,
    }
    assert told["text"]


async def test_a_completion_is_generate_in_another_form(service: Service, tokenizer: Tokenizer) -> None:
    tokens = tokenizer.ids(PROMPT)
    answer = await ask(service, TEXT, max_tokens=len(tokens))
    assert answer["object"] == "text_completion"
    assert answer["id"] == f"cmpl-{sent(service).id}"
    assert answer["choices"] == [{"index": 0, "text": PROMPT, "logprobs": None, "finish_reason": "length"}]
    assert answer["usage"]["completion_tokens"] == len(tokens)


@pytest.mark.parametrize("logprobs", [False, True])
@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_a_stream_says_what_the_whole_answer_says(service: Service, path: str, logprobs: bool) -> None:
    more: dict[str, Any] = {"max_tokens": 40, "stop": "Lisbon, 東"}
    if logprobs:
        more |= {"logprobs": True, "top_logprobs": 2} if path == CHAT else {"logprobs": 2}
    whole = await ask(service, path, **more)
    told = await chunks(service, path, **more, stream_options={"include_usage": True})
    *pieces, usage = told
    assert usage["choices"] == []
    assert usage["usage"] == whole["usage"]
    assert all(piece["usage"] is None for piece in pieces)
    kind = "chat.completion.chunk" if path == CHAT else "text_completion"
    assert {(piece["object"], piece["id"], piece["model"]) for piece in told} == {
        (kind, told[0]["id"], "fake")
    }
    choices = [piece["choices"][0] for piece in pieces]
    assert [choice["finish_reason"] for choice in choices] == [*[None] * (len(choices) - 1), "stop"]
    assert pieces[-1]["memory_version"] == whole["memory_version"]
    (wanted,) = whole["choices"]
    if path == CHAT:
        assert [choice["delta"].pop("role", None) for choice in choices] == [
            "assistant",
            *[None] * (len(choices) - 1),
        ]
        text = "".join(choice["delta"].get("content", "") for choice in choices)
        assert text == wanted["message"]["content"]
        name = "content"
    else:
        text = "".join(choice["text"] for choice in choices)
        assert text == wanted["text"]
        name = "text_offset"
    assert text.endswith("cello in ")
    if logprobs:
        joined = [item for choice in choices for item in (choice["logprobs"] or {}).get(name, [])]
        assert joined == wanted["logprobs"][name]
        assert len(joined) == whole["usage"]["completion_tokens"]
    else:
        assert wanted["logprobs"] is None


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_without_being_asked_a_stream_has_no_usage(service: Service, path: str) -> None:
    told = await chunks(service, path)
    assert not any("usage" in chunk for chunk in told)
    assert all(len(chunk["choices"]) == 1 for chunk in told)


async def test_logprobs_of_a_chat(service: Service, tokenizer: Tokenizer) -> None:
    tokens = tokenizer.ids("東京")
    answer = await ask(
        service,
        CHAT,
        messages=[{"role": "user", "content": "x"}],
        max_tokens=3,
        logprobs=True,
        top_logprobs=1,
    )
    first = answer["choices"][0]["logprobs"]["content"][0]
    word = tokenizer.word(sent(service).tokens[0])
    assert first == {
        "token": word,
        "logprob": -0.25,
        "bytes": list(word.encode()),
        "top_logprobs": [{"token": tokenizer.word(0), "logprob": 0.0, "bytes": list(b"<s>")}],
    }
    assert await ask(service, CHAT, logprobs=True)
    assert sent(service, 1).sampling.logprobs == 0
    broken = next(token for token in tokens if "\N{REPLACEMENT CHARACTER}" in tokenizer.word(token))
    answer = await ask(service, TEXT, prompt=[broken], max_tokens=1, logprobs=0)
    assert answer["choices"][0]["logprobs"]["tokens"] == ["\N{REPLACEMENT CHARACTER}"]


async def test_half_a_character_has_no_bytes(service: Service, tokenizer: Tokenizer) -> None:
    """A chat whose template begins with the sent text gives back its tokens one by one."""
    answer = await ask(service, CHAT, logprobs=True, max_tokens=60)
    items = answer["choices"][0]["logprobs"]["content"]
    halves = [item for item in items if "\N{REPLACEMENT CHARACTER}" in item["token"]]
    assert halves
    assert all(item["bytes"] is None for item in halves)
    assert all(bytes(item["bytes"]).decode() == item["token"] for item in items if item not in halves)


async def test_logprobs_of_a_completion(service: Service, tokenizer: Tokenizer) -> None:
    words = [tokenizer.word(token) for token in tokenizer.ids(PROMPT)[:3]]
    answer = await ask(service, TEXT, max_tokens=3, logprobs=2)
    assert answer["choices"][0]["logprobs"] == {
        "tokens": words,
        "token_logprobs": [-0.25] * 3,
        "top_logprobs": [{tokenizer.word(1): -0.5, tokenizer.word(0): 0.0, word: -0.25} for word in words],
        "text_offset": [0, len(words[0]), len(words[0]) + len(words[1])],
    }


# ------------------------------------------------------------ what is taken


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_sampling_is_passed_on(service: Service, path: str) -> None:
    wanted = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "repetition_penalty": 1.5,
        "seed": 11,
        "max_tokens": 3,
    }
    await ask(service, path, **wanted, ignore_eos=True)
    sampling = sent(service).sampling
    assert {name: getattr(sampling, name) for name in wanted} == wanted
    assert sampling.stop_tokens == ()
    await ask(service, path, seed=-1)
    sampling = sent(service, 1).sampling
    assert sampling.seed == 2**63 - 1
    assert sampling.stop_tokens == service.client.require().stop_tokens
    assert sampling.temperature == service.client.require().temperature


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_what_means_nothing_changes_nothing(service: Service, path: str) -> None:
    more = NO_TOOLS if path == CHAT else {"best_of": 1, "echo": False, "suffix": ""}
    await ask(service, path)
    await ask(service, path, **NOTHING, **more)
    # null is nothing, of fields too that this server does not know
    unknown = ["reasoning_effort", "verbosity", "prediction", "audio", "web_search_options"]
    await ask(service, path, **dict.fromkeys([*NOTHING, *more, *unknown]))
    first, *others = [message for message in service.seen if isinstance(message, Generate)]
    for other in others:
        assert (other.tokens, other.sampling) == (first.tokens, first.sampling)
    assert len(others) == 2


async def test_turns_in_every_form(service: Service) -> None:
    """As their own programs send them, and as an answer is sent back that came from here."""
    answer = await ask(service, CHAT)
    turns = [
        {"role": "developer", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "Hello."}, {"type": "text", "text": "You?"}]},
        {**answer["choices"][0]["message"], "tool_calls": None, "annotations": [], "parsed": None},
        {"role": "user", "content": "", "name": "Ann", "type": "text"},
    ]
    await ask(service, CHAT, messages=turns)
    plain = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hello.\nYou?"},
        {"role": "assistant", "content": answer["choices"][0]["message"]["content"]},
        {"role": "user", "content": ""},
    ]
    await ask(service, CHAT, messages=plain)
    assert sent(service, 1).tokens == sent(service, 2).tokens


async def test_prompts_in_every_form(service: Service, tokenizer: Tokenizer) -> None:
    tokens = tokenizer.ids(PROMPT)
    for prompt in (PROMPT, [PROMPT], tokens, [tokens]):
        await ask(service, TEXT, prompt=prompt)
    assert [message.tokens for message in service.seen if isinstance(message, Generate)] == [tokens] * 4


async def test_how_many_tokens(service: Service, tokenizer: Tokenizer) -> None:
    """The number is an upper bound: what there is room for will do. No number: what is usual."""
    length = len(tokenizer.ids(PROMPT))
    await ask(service, CHAT, max_tokens=None)
    chat = sent(service)
    assert chat.sampling.max_tokens == MAX_SEQUENCE - len(chat.tokens) < CHAT_TOKENS
    await ask(service, CHAT, max_tokens=None, max_completion_tokens=5)
    assert sent(service, 1).sampling.max_tokens == 5
    await ask(service, TEXT, max_tokens=None)
    assert sent(service, 2).sampling.max_tokens == COMPLETION_TOKENS
    await ask(service, TEXT, prompt=[5] * (MAX_SEQUENCE - 3), max_tokens=None)
    assert sent(service, 3).sampling.max_tokens == 3
    for number, (path, field) in enumerate(
        [(CHAT, "max_tokens"), (CHAT, "max_completion_tokens"), (TEXT, "max_tokens")], start=4
    ):
        cut = await ask(service, path, **{"max_tokens": None, field: 2**31 - 1}, ignore_eos=True)
        room = MAX_SEQUENCE - (length if path == TEXT else len(chat.tokens))
        assert sent(service, number).sampling.max_tokens == room
        assert cut["choices"][0]["finish_reason"] == "length"
        assert cut["usage"]["total_tokens"] == MAX_SEQUENCE
    # of its own the server is asked for what it can do
    own = {"tenant": "alice", "prompt": PROMPT, "max_tokens": MAX_SEQUENCE - length + 1}
    check_error(await service.post("/generate", own), 422, "too_many_tokens", "prompt")
    assert len(service.seen) == 7


@pytest.mark.parametrize("limit", [None, 1])
@pytest.mark.parametrize(
    ("path", "more"),
    [
        (TEXT, {"prompt": [5] * MAX_SEQUENCE}),
        (TEXT, {"prompt": SECRET * 400}),
        (CHAT, {"messages": [{"role": "user", "content": SECRET * 400}]}),
    ],
)
async def test_a_prompt_that_leaves_no_room_is_refused_as_clients_know_it(
    service: Service, path: str, more: dict[str, Any], limit: int | None
) -> None:
    """They look for status, code and the first words, and shorten what they send."""
    refused = await service.post(path, {**BODIES[path], **more, "max_tokens": limit})
    param = "prompt" if path == TEXT else "messages"
    check_error(refused, 400, "context_length_exceeded", param)
    error = refused.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"].startswith(f"This model's maximum context length is {MAX_SEQUENCE} tokens;")
    assert service.seen == []


async def test_what_cannot_wait_here_is_not_too_long_for_the_model(model_dir: Path) -> None:
    async with bounded(model_dir, queue_tokens=5) as service:
        check_error(await service.post(TEXT, GO_ON), 422, "too_many_tokens", "prompt")


@pytest.mark.parametrize(
    ("path", "more", "param"),
    [
        *((path, {SECRET: 1}, None) for path in BODIES),
        *((path, {"n": 2}, "n") for path in BODIES),
        *((path, {"frequency_penalty": 0.5}, "frequency_penalty") for path in BODIES),
        *((path, {"presence_penalty": -1}, "presence_penalty") for path in BODIES),
        *((path, {"logit_bias": {SECRET: 1}}, "logit_bias") for path in BODIES),
        *((path, {"stop": [SECRET] * 9}, "stop") for path in BODIES),
        *((path, {"stream": 1}, "stream") for path in BODIES),
        *((path, {"stream_options": {"include_usage": True}}, None) for path in BODIES),
        *((path, {"stream": True, "stream_options": {SECRET: 1}}, "stream_options") for path in BODIES),
        *((path, {"temperature": -1}, "temperature") for path in BODIES),
        *((path, {"seed": 2**63}, "seed") for path in BODIES),
        *((path, {"max_tokens": 0}, "max_tokens") for path in BODIES),
        *((path, {"user": ""}, "user") for path in BODIES),
        *((path, {"user": {SECRET: 1}}, "user") for path in BODIES),
        *((path, {"user": f"{SECRET}\n"}, "user") for path in BODIES),
        *((path, {"model": ""}, "model") for path in BODIES),
        *((path, {"metadata": {str(i): SECRET for i in range(17)}}, "metadata") for path in BODIES),
        (CHAT, {"prompt": SECRET}, None),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": None}, "messages"),
        (CHAT, {"messages": [{"role": "tool", "content": SECRET}]}, "messages.0.role"),
        (CHAT, {"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        (CHAT, {"messages": [{"role": "user", "content": "x", SECRET: 1}]}, "messages.0"),
        (CHAT, {"messages": [{"role": "user", "content": f"{SECRET}\0"}]}, "messages.0.content"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url", "text": SECRET}]}]},
            "messages.0.content.0.type",
        ),
        (
            CHAT,
            {"messages": [{"role": "assistant", "content": "x", "tool_calls": [SECRET]}]},
            "messages.0.tool_calls",
        ),
        (CHAT, {"max_completion_tokens": 3}, None),
        (CHAT, {"top_logprobs": 2}, None),
        (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (CHAT, {"logprobs": 2}, "logprobs"),
        (CHAT, {"tools": [{"type": "function", "function": {"name": SECRET}}]}, "tools"),
        (CHAT, {"tool_choice": "required"}, "tool_choice"),
        (CHAT, {"response_format": {"type": "json_object"}}, "response_format.type"),
        (CHAT, {"modalities": ["text", "audio"]}, "modalities"),
        (TEXT, {"messages": ASK["messages"]}, None),
        (TEXT, {"prompt": None}, "prompt"),
        (TEXT, {"prompt": ""}, "prompt"),
        (TEXT, {"prompt": [SECRET, SECRET]}, "prompt"),
        (TEXT, {"prompt": []}, "prompt"),
        (TEXT, {"echo": True}, "echo"),
        (TEXT, {"best_of": 2}, "best_of"),
        (TEXT, {"suffix": SECRET}, "suffix"),
        (TEXT, {"logprobs": True}, "logprobs"),
    ],
)
async def test_what_is_not_done_is_refused(
    service: Service, path: str, more: dict[str, Any], param: str | None
) -> None:
    check_error(await service.post(path, {**BODIES[path], **more}), 422, "invalid_request", param)
    assert service.seen == []


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_another_model_is_not_found(service: Service, path: str) -> None:
    assert await ask(service, path, model="fake")
    refused = await service.post(path, {**BODIES[path], "model": SECRET})
    check_error(refused, 404, "model_not_found", "model")
    assert "fake" in refused.json()["error"]["message"]
    assert len(service.seen) == 1


async def test_models(service: Service) -> None:
    listed = (await service.http.get("/v1/models")).json()
    (model,) = listed["data"]
    assert listed["object"] == "list"
    assert model == {
        "id": "fake",
        "object": "model",
        "created": model["created"],
        "owned_by": "memoryllm-serve",
        "max_model_len": MAX_SEQUENCE,
        "min_context": MIN_CONTEXT,
        "max_context": MAX_CONTEXT,
        "num_tokens": NUM_TOKENS,
        "num_blocks": 4,
    }
    assert (await service.http.get("/v1/models/fake")).json() == model
    check_error(await service.http.get(f"/v1/models/{SECRET}"), 404, "model_not_found", "model")
    service.client.drain(1)
    check_error(await service.http.get("/v1/models"), 503, "worker_unavailable")


async def test_a_model_with_the_name_of_a_hub(settings: Settings, model_dir: Path) -> None:
    """``ORG/NAME`` is its whole name, and half of it another model's."""
    service = await start_service(settings, str(model_dir), name="org/name")
    async with service.http:
        (model,) = (await service.http.get("/v1/models")).json()["data"]
        assert model["id"] == "org/name"
        for path in ("/v1/models/org/name", "/v1/models/org%2Fname"):
            assert (await service.http.get(path)).json() == model
        for path in ("/v1/models/name", "/v1/models/org", "/v1/models/org/name/"):
            check_error(await service.http.get(path), 404, "model_not_found", "model")
        assert (await ask(service, CHAT, model="org/name"))["model"] == "org/name"
        check_error(await service.post(CHAT, {**ASK, "model": "name"}), 404, "model_not_found", "model")


# ------------------------------------------------------------ whose memory


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_whose_memory(service: Service, path: str) -> None:
    body = {name: value for name, value in BODIES[path].items() if name != "user"}
    check_error(await service.post(path, body), 422, "invalid_request", "user")
    assert service.seen == []
    name = "zoë 東"
    for more, headers, tenant in (
        ({"user": "bob"}, {}, "bob"),
        ({"user": "bob"}, {"x-tenant": "carol"}, "carol"),
        ({}, {"x-tenant": name.encode()}, name),
    ):
        answer = await service.post(path, {**body, **more}, headers=headers)
        assert answer.status_code == 200, answer.text
        last = service.seen[-1]
        assert isinstance(last, Generate)
        assert last.tenant == tenant


@pytest.mark.parametrize("value", [b"\xff", f"{SECRET}\t".encode() + b"x", b"x" * 257, b"..", b""])
async def test_a_header_that_is_no_name(service: Service, value: bytes) -> None:
    refused = await service.post(CHAT, ASK, headers={"x-tenant": value})
    check_error(refused, 422, "invalid_request", "X-Tenant")
    assert service.seen == []


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_whose_memory_a_key_says(guarded: Service, path: str) -> None:
    body = {name: value for name, value in BODIES[path].items() if name != "user"}
    for who, user, header, tenant in (
        # many programs send a user of their own: with a key for one tenant it means nothing
        ("ada", None, None, "ada"),
        ("ada", "bob", None, "ada"),
        ("ada", {"id": "bob\n"}, None, "ada"),
        ("ada", "bob", "ada", "ada"),
        ("team", "team/x", None, "team/x"),
        ("team", "bob", "team/y", "team/y"),
        ("admin", "bob", None, "bob"),
    ):
        headers = bearer(who) | ({"x-tenant": header} if header else {})
        answer = await guarded.post(path, {**body, **({"user": user} if user else {})}, headers=headers)
        assert answer.status_code == 200, (who, user, header, answer.text)
        last = guarded.seen[-1]
        assert isinstance(last, Generate)
        assert last.tenant == tenant
    count = len(guarded.seen)
    for who, user, header, status in (
        ("ada", "ada", "bob", 404),
        ("team", "bob", None, 404),
        ("team", "team/x", "bob", 404),
        ("team", None, None, 422),
    ):
        headers = bearer(who) | ({"x-tenant": header} if header else {})
        refused = await guarded.post(path, {**body, **({"user": user} if user else {})}, headers=headers)
        assert refused.status_code == status, (who, user, header)
        if status == 404:
            check_error(refused, 404, "tenant_not_found")
    assert len(guarded.seen) == count
    check_error(await guarded.http.get("/v1/models"), 401, "invalid_api_key")
    assert (await guarded.http.get("/v1/models", headers=bearer("ada"))).status_code == 200
