"""OpenAI's own client speaks with a server that remembers."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from app.keys.file import write
from app.keys.ring import make
from tests.server.process import ServerProcess

QUESTION = {"role": "user", "content": "What is my dog called?"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path_factory.mktemp("openai") / "store", model="pocket") as running:
        running.update("ada", "My dog is called Rex.")
        running.update("bob", "My dog is called Bruno.")
        yield running


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_a_chat_is_answered_from_the_memory(client: openai.OpenAI) -> None:
    for tenant, name in (("ada", "Rex"), ("bob", "Bruno")):
        answer = client.chat.completions.create(model="pocket", messages=[QUESTION], user=tenant)
        (choice,) = answer.choices
        assert (choice.message.content or "").strip() == name
        assert (choice.message.role, choice.finish_reason) == ("assistant", "stop")
        assert answer.model == "pocket"
        assert answer.usage is not None
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
        assert answer.to_dict()["memory_version"] == 1
        # what came can be sent back as it came
        with client.chat.completions.stream(model="pocket", messages=[QUESTION], user=tenant) as stream:
            streamed = stream.get_final_completion().choices[0].message
        for message in (choice.message, streamed):
            more = [QUESTION, message, QUESTION]
            again = client.chat.completions.create(model="pocket", messages=more, user=tenant)
            assert again.choices[0].message.content


def test_a_chat_is_streamed(client: openai.OpenAI) -> None:
    with client.chat.completions.create(
        model="pocket",
        messages=[QUESTION],
        extra_headers={"X-Tenant": "ada"},
        stream=True,
        stream_options={"include_usage": True},
        logprobs=True,
        top_logprobs=2,
    ) as stream:
        chunks = list(stream)
    *pieces, last = chunks
    text = "".join(chunk.choices[0].delta.content or "" for chunk in pieces)
    assert text.strip() == "Rex"
    assert pieces[0].choices[0].delta.role == "assistant"
    assert pieces[-1].choices[0].finish_reason == "stop"
    assert last.usage is not None
    logprobs = [
        item
        for chunk in pieces
        if chunk.choices[0].logprobs is not None
        for item in chunk.choices[0].logprobs.content or []
    ]
    assert len(logprobs) == last.usage.completion_tokens
    assert all(item.logprob <= 0 and len(item.top_logprobs) == 2 for item in logprobs)


def test_a_text_is_continued(client: openai.OpenAI) -> None:
    body = {"model": "pocket", "prompt": "My dog is called", "user": "bob", "max_tokens": 4}
    whole = client.completions.create(**body, logprobs=1)
    assert "Bruno" in whole.choices[0].text
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None
    assert len(logprobs.tokens or []) == len(logprobs.top_logprobs or []) > 0
    with client.completions.create(**body, stream=True) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text


def test_the_model_is_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["pocket"]
    assert client.models.retrieve("pocket").object == "model"
    with pytest.raises(openai.NotFoundError, match="is called pocket"):
        client.chat.completions.create(model="gpt", messages=[QUESTION], user="ada")


def test_the_client_teaches(client: openai.OpenAI, server: ServerProcess) -> None:
    """As docs/http.md shows it."""
    memory = client.with_options(base_url=server.url)
    body = {"tenant": "zoe", "text": "My dog is called Rex."}
    for _ in range(2):
        told = memory.post(
            "/update", cast_to=object, body=body, options={"headers": {"Idempotency-Key": "note-17"}}
        )
        assert isinstance(told, dict)
        assert told["memory_version"] == 1
    answer = client.chat.completions.create(model="pocket", messages=[QUESTION], user="zoe")
    assert (answer.choices[0].message.content or "").strip() == "Rex"
    assert client.base_url.path == "/v1/"
    with pytest.raises(openai.ConflictError) as refused:
        memory.post(
            "/update",
            cast_to=object,
            body=body | {"text": "My dog is called Bruno."},
            options={"headers": {"Idempotency-Key": "note-17"}},
        )
    assert refused.value.code == "idempotency_conflict"


def test_a_chat_teaches_before_it_answers(client: openai.OpenAI, server: ServerProcess) -> None:
    """As docs/http.md shows it."""
    for stream in (False, True):
        answer = client.chat.completions.create(
            model="pocket",
            user="yan",
            messages=[QUESTION],
            extra_body={"remember": "My dog is called Rex."},
            extra_headers={"Idempotency-Key": "note-18"},
            stream=stream,
        )
        if isinstance(answer, openai.Stream):
            text = "".join(chunk.choices[0].delta.content or "" for chunk in answer)
        else:
            text = answer.choices[0].message.content or ""
        assert text.strip() == "Rex"
    assert server.version("yan") == 1


def test_a_limit_is_an_upper_bound_and_an_overflow_the_client_s_own(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="pocket", messages=[QUESTION], user="ada", max_tokens=4096)
    assert answer.choices[0].finish_reason == "stop"
    long = {"role": "user", "content": "What is my dog called? " * 2000}
    with pytest.raises(openai.BadRequestError, match="maximum context length is 4096 tokens") as refused:
        client.chat.completions.create(model="pocket", messages=[long], user="ada")
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "messages")


def test_errors_are_the_client_s_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        client.chat.completions.create(model="pocket", messages=[QUESTION])
    assert (refused.value.code, refused.value.param) == ("invalid_request", "user")
    assert refused.value.request_id
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        client.chat.completions.create(model="pocket", messages=[QUESTION], user="ada", n=2)
    assert refused.value.param == "n"


def test_a_key_says_whose_memory_it_is(tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("keyed")
    key, entry = make(tenants=["ada"])
    write(directory / "keys.json", [entry])
    with ServerProcess(directory / "store", model="pocket", keys_file=directory / "keys.json") as server:
        told = server.http.post(
            "/update",
            json={"text": "My dog is called Rex."},
            headers={"authorization": f"Bearer {key}"},
        )
        assert told.status_code == 200
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) as client:
            answer = client.chat.completions.create(model="pocket", messages=[QUESTION], user="somebody")
            assert (answer.choices[0].message.content or "").strip() == "Rex"
        stranger = openai.OpenAI(base_url=f"{server.url}/v1", api_key="mllm-no", max_retries=0)
        with stranger, pytest.raises(openai.AuthenticationError):
            stranger.models.list()
