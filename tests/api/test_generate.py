"""POST /generate: text, tokens, streaming, stop strings, and clients that go away."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest

from app.api.streaming import event
from app.api.tokens import Tokenizer
from app.messages import Cancel, Finished, Generate, Timings, Tokens
from app.settings import Settings
from tests.api.conftest import Service, start_service, until
from tests.api.fake_worker import EOS
from tests.api.test_bad_input import check_error
from tests.api.test_update import events

pytestmark = pytest.mark.anyio

PROMPT = "She teaches the cello in Lisbon, 東京 👩‍👩‍👧. "


def sent(service: Service, place: int = 0) -> Generate:
    message = [message for message in service.seen if isinstance(message, Generate)][place]
    assert isinstance(message, Generate)
    return message


async def generate(service: Service, **body: Any) -> Any:
    """The answer as one, and, checked to say the same, as a stream."""
    body = {"tenant": "alice", **body}
    whole = await service.post("/generate", body)
    assert whole.status_code == 200, whole.text
    streamed = await service.post("/generate", {**body, "stream": True})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    told = [data for _, data in events(streamed.text)]
    assert told[-1] == "[DONE]"
    *chunks, last = told[:-1]
    assert all(set(chunk) <= {"text", "token_ids", "logprobs"} for chunk in chunks)
    answer = whole.json()
    joined = {**last, "id": answer["id"], "text": "".join(chunk["text"] for chunk in [*chunks, last])}
    for name in ("token_ids", "logprobs"):
        if name in answer:
            joined[name] = [item for chunk in [*chunks, last] for item in chunk.get(name, [])]
    assert joined == answer
    return answer


async def test_answer(service: Service, tokenizer: Tokenizer) -> None:
    tokens = tokenizer.ids(PROMPT)
    answer = await generate(service, prompt=PROMPT, max_tokens=2 * len(tokens))
    assert answer["text"] == PROMPT * 2
    assert answer["finish_reason"] == "length"
    assert answer["usage"] == {
        "prompt_tokens": len(tokens),
        "completion_tokens": 2 * len(tokens),
        "total_tokens": 3 * len(tokens),
    }
    assert answer["memory_version"] == 0
    assert answer["timings"] == {"queue": 0.001, "load": 0.0, "first_token": 0.002, "total": 0.003}
    assert "token_ids" not in answer
    assert "logprobs" not in answer


async def test_defaults_are_the_checkpoints(service: Service) -> None:
    await service.post("/generate", {"tenant": "alice", "prompt": PROMPT})
    sampling = sent(service).sampling
    model = service.client.require()
    assert sampling.max_tokens == 128
    assert sampling.stop_tokens == model.stop_tokens
    assert sampling.temperature == model.temperature
    assert (sampling.seed, sampling.logprobs, sampling.min_p) == (None, None, 0.0)


async def test_sampling_is_passed_on(service: Service) -> None:
    wanted = {
        "max_tokens": 3,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "repetition_penalty": 1.5,
        "seed": 11,
        "logprobs": 2,
    }
    body = {"tenant": "alice", "prompt": PROMPT, "ignore_eos": True, "priority": 3, "timeout": 5, **wanted}
    before = time.time()
    assert (await service.post("/generate", body)).status_code == 200
    message = sent(service)
    assert {name: getattr(message.sampling, name) for name in wanted} == wanted
    assert message.sampling.stop_tokens == ()
    assert message.priority == 3
    assert message.deadline is not None
    assert before + 5 <= message.deadline <= time.time() + 5


async def test_what_the_caller_leaves_open_is_as_the_checkpoint_wants_it(
    settings: Settings, model_dir: Path
) -> None:
    wants = {"temperature": 0.6, "top_p": 0.9, "top_k": 50, "repetition_penalty": 1.1}
    service = await start_service(settings, str(model_dir), **wants)
    asked = {"temperature": 0, "top_p": 1, "top_k": 0, "repetition_penalty": 1}
    async with service.http:
        bodies: list[dict[str, float]] = [{}, *({name: value} for name, value in asked.items())]
        for place, body in enumerate(bodies):
            answer = await service.post("/generate", {"tenant": "alice", "prompt": PROMPT, **body})
            assert answer.status_code == 200
            told = sent(service, place).sampling
            assert {name: getattr(told, name) for name in wants} == {**wants, **body}


async def test_timeout_is_bounded_by_the_server(service: Service) -> None:
    await service.post("/generate", {"tenant": "alice", "prompt": PROMPT, "timeout": 86_000})
    assert (sent(service).deadline or 0) <= time.time() + service.settings.request_timeout


async def test_stop_token(service: Service, tokenizer: Tokenizer) -> None:
    prompt = [*tokenizer.ids("She lives in Lisbon"), EOS]
    answer = await generate(service, prompt=prompt, return_token_ids=True)
    assert answer["text"] == "She lives in Lisbon"
    assert answer["finish_reason"] == "stop"
    assert answer["token_ids"] == prompt[:-1]
    going_on = await generate(service, prompt=prompt, ignore_eos=True, max_tokens=2 * len(prompt))
    assert going_on["text"] == "She lives in Lisbon" * 2


async def test_token_ids_and_logprobs(service: Service, tokenizer: Tokenizer) -> None:
    answer = await generate(service, prompt="Lisbon", max_tokens=2, return_token_ids=True, logprobs=1)
    assert len(answer["token_ids"]) == len(answer["logprobs"]) == 2
    first = answer["logprobs"][0]
    assert first["token_id"] == answer["token_ids"][0] == tokenizer.ids("Lisbon")[0]
    assert first["token"] == tokenizer.decode(answer["token_ids"][:1])
    assert first["logprob"] == -0.25
    assert first["top"] == [{"token_id": 0, "token": "<s>", "logprob": 0.0}]


async def test_without_tokenizer(bare: Service) -> None:
    answer = await generate(bare, prompt=[5, 6], max_tokens=3, return_token_ids=True, logprobs=0)
    assert (answer["text"], answer["token_ids"]) == ("", [5, 6, 5])


async def test_chat(service: Service, tokenizer: Tokenizer) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where?"}]
    await service.post("/generate", {"tenant": "alice", "messages": messages})
    said = "<|system|>Be brief.\n<|user|>Where?\n<|assistant|>"
    assert sent(service).tokens == tokenizer.ids(said)
    # the template's BOS was taken off
    assert 0 not in sent(service).tokens


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("cello", "She teaches the "),
        ([", ", "in Lis"], "She teaches the cello "),
        ("京 👩", "She teaches the cello in Lisbon, 東"),
        (". She", PROMPT[:-2]),
        ("She", ""),
        ("nowhere", None),
        ([], None),
    ],
)
async def test_stop_strings(service: Service, tokenizer: Tokenizer, stop: Any, text: str | None) -> None:
    tokens = tokenizer.ids(PROMPT)
    answer = await generate(
        service, prompt=PROMPT, stop=stop, max_tokens=len(tokens) + 1, return_token_ids=True
    )
    if text is None:
        assert answer["text"].startswith(PROMPT)
        assert answer["finish_reason"] == "length"
        assert not [message for message in service.seen if isinstance(message, Cancel)]
        return
    assert answer["text"] == text
    assert answer["finish_reason"] == "stop"
    assert answer["stop_reason"] in stop if isinstance(stop, list) else answer["stop_reason"] == stop
    # what was counted is what was needed to see the stop string, whatever the worker had made by then
    assert answer["usage"]["completion_tokens"] == len(answer["token_ids"])
    said = tokenizer.decode(answer["token_ids"])
    assert answer["stop_reason"] in said
    assert answer["stop_reason"] not in tokenizer.decode(answer["token_ids"][:-1])
    await service.until_seen(Cancel, 2)
    cancelled = [message for message in service.seen if isinstance(message, Cancel)]
    assert cancelled == [Cancel(sent(service, n).id, "stop") for n in (0, 1)]


async def read_body(
    service: Service, body: dict[str, Any], path: str = "/generate"
) -> tuple[asyncio.Task[None], asyncio.Event, list[Any]]:
    """Calls the app as a server would, with a client that closes its connection when the event is set."""
    gone = asyncio.Event()
    out: list[Any] = []
    incoming = iter([{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}])

    async def receive() -> Any:
        for message in incoming:
            return message
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        out.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "http_version": "1.1",
        "scheme": "http",
        "root_path": "",
        "server": ("test", 80),
        "client": ("test", 1),
    }
    return asyncio.create_task(service.app(scope, receive, send)), gone, out


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("tenant", ["hold", "mute"])
async def test_a_client_that_goes_ends_its_generation(service: Service, stream: bool, tenant: str) -> None:
    body = {"tenant": tenant, "prompt": PROMPT, "stream": stream}
    call, gone, _ = await read_body(service, body)
    message = await service.until_seen(Generate)
    gone.set()
    cancel = await service.until_seen(Cancel)
    assert isinstance(cancel, Cancel)
    assert isinstance(message, Generate)
    assert cancel.id == message.id
    await asyncio.wait_for(call, 10)
    assert service.client.open_requests == 0


def text_of(out: list[Any]) -> str:
    sent = b"".join(message.get("body", b"") for message in out).decode()
    return "".join(data["text"] for _, data in events(sent))


async def test_a_stream_gives_each_token_as_it_comes(service: Service, tokenizer: Tokenizer) -> None:
    body = {"tenant": "mute", "prompt": PROMPT, "stream": True}
    call, _, out = await read_body(service, body)
    message = await service.until_seen(Generate)
    assert isinstance(message, Generate)
    tokens = tokenizer.ids("Maya 👍")
    shown = ""
    for place, token in enumerate(tokens):
        service.answer(Tokens(message.id, [token], None, 0 if place == 0 else None))
        shown = tokenizer.decode(tokens[: place + 1])
        if "\N{REPLACEMENT CHARACTER}" in shown:
            continue
        await until(lambda wanted=shown: text_of(out) == wanted)
    service.answer(Finished(message.id, "length", 0, 5, len(tokens), Timings()))
    await asyncio.wait_for(call, 10)
    assert out[-1] == {"type": "http.response.body", "body": b"", "more_body": False}


async def test_worker_error_in_a_stream(service: Service) -> None:
    body = {"tenant": "hold", "prompt": PROMPT, "stream": True}
    call, _, out = await read_body(service, body)
    await service.until_seen(Generate)
    await until(lambda: len(out) > 1)
    service.client.detach("the worker ended with exit code 9")
    await asyncio.wait_for(call, 10)
    told = events(b"".join(message.get("body", b"") for message in out).decode())
    assert told[-1][0] == "error"
    assert told[-1][1]["error"]["code"] == "worker_unavailable"


async def test_worker_error_before_the_stream(service: Service) -> None:
    body = {"tenant": "busy", "prompt": PROMPT, "stream": True}
    check_error(await service.post("/generate", body), 429, "tenant_queue_full")


async def test_a_slow_reader_holds_up_nobody(service: Service) -> None:
    stream = service.client.open(sentinel := Generate("slow", "mute", [5], (await _sampling(service))))
    with stream:
        await service.until_seen(Generate)
        for _ in range(1000):
            service.answer(Tokens(sentinel.id, [5]))
        answer = await service.post("/generate", {"tenant": "alice", "prompt": PROMPT, "max_tokens": 2})
        assert answer.status_code == 200


async def _sampling(service: Service) -> Any:
    await service.post("/generate", {"tenant": "alice", "prompt": PROMPT, "max_tokens": 1})
    found = sent(service).sampling
    del service.seen[:]
    return found


async def test_requests_of_one_tick_share_a_frame(service: Service) -> None:
    bodies = [{"tenant": f"t{number}", "prompt": "Lisbon", "max_tokens": 2} for number in range(8)]
    answers = await asyncio.gather(*[service.post("/generate", body) for body in bodies])
    assert all(answer.status_code == 200 for answer in answers)
    assert max(service.frames) > 1


def test_an_event_is_one_line_whatever_the_text() -> None:
    data = "a\nb\r\nc\u2028d\0"
    (line,) = [line for line in event({"text": data}).decode().split("\n") if line]
    assert json.loads(line.removeprefix("data: ")) == {"text": data}
