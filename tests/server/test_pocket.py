"""A newcomer's server, end to end over real HTTP: the pocket model, which truly remembers."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator

import httpx
import pytest

from experiments.data import ASKED
from tests.server.process import ServerProcess, until
from training.facts import FactGenerator


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path_factory.mktemp("pocket") / "store", model="pocket") as running:
        yield running


def ask(server: ServerProcess, tenant: str, question: str) -> str:
    messages = [{"role": "user", "content": question}]
    answer = server.post("/generate", tenant=tenant, messages=messages, max_tokens=32)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["text"]).strip()


def test_facts_it_never_saw_are_remembered(server: ServerProcess) -> None:
    """Twenty of the five hundred that ``experiments.recall`` asks; the floor here is that experiment's own."""
    generator = FactGenerator(2026, held_out=True, relations=ASKED)
    facts = [generator.fact() for _ in range(20)]
    blank = remembered = later = 0
    for number, fact in enumerate(facts):
        tenant = f"fact-{number}"
        blank += ask(server, tenant, fact.question) == fact.answer
        server.update(tenant, fact.statement)
        remembered += ask(server, tenant, fact.question) == fact.answer
        for _ in range(10):
            server.update(tenant, generator.unrelated(fact).statement)
        later += ask(server, tenant, fact.question) == fact.answer
    assert blank <= 1
    assert remembered >= 17
    assert later >= 12


def test_tenants_know_only_their_own(server: ServerProcess) -> None:
    server.update("one", "My dog is called Rex.")
    server.update("two", "My dog is called Bruno.")
    assert ask(server, "one", "What is my dog called?") == "Rex"
    assert ask(server, "two", "What is my dog called?") == "Bruno"


def test_a_stream_says_what_the_whole_answer_says(server: ServerProcess) -> None:
    server.update("stream", "Mira Tolvan lives in Tarnovik.")
    body = {"tenant": "stream", "prompt": "Mira Tolvan lives in", "max_tokens": 16, "return_token_ids": True}
    whole = server.post("/generate", **body).json()
    text, tokens, final, done = "", [], {}, False
    with server.http.stream("POST", "/generate", json=body | {"stream": True}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line == "data: [DONE]":
                done = True
            elif line.startswith("data:"):
                final = json.loads(line.removeprefix("data:"))
                text += final["text"]
                tokens += final.get("token_ids") or []
    assert done
    assert (text, tokens) == (whole["text"], whole["token_ids"])
    for key in ("finish_reason", "usage", "memory_version"):
        assert final[key] == whole[key]


def test_sampling_with_a_seed_repeats(server: ServerProcess) -> None:
    body = {"tenant": "sampled", "prompt": "The", "max_tokens": 24, "temperature": 1.0, "ignore_eos": True}
    one, two, other = (
        server.post("/generate", **body, seed=seed).json()["text"] for seed in (1, 1, 2)
    )  # fmt: skip
    assert one == two != other


def test_stop_strings_end_the_text_before_them(server: ServerProcess) -> None:
    body = {"tenant": "stopped", "prompt": "The", "max_tokens": 24, "ignore_eos": True}
    whole = server.post("/generate", **body).json()["text"]
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    answer = server.post("/generate", **body, stop=stop).json()
    assert answer["text"] == whole[: whole.index(stop)]
    assert answer["finish_reason"] == "stop"


def test_logprobs_and_scores_agree(server: ServerProcess) -> None:
    server.update("scored", "Mira Tolvan lives in Tarnovik.")
    prompt = "Mira Tolvan lives in"
    made = server.post(
        "/generate",
        tenant="scored",
        prompt=prompt,
        max_tokens=6,
        logprobs=2,
        return_token_ids=True,
        ignore_eos=True,
    ).json()
    score = server.post("/score", tenant="scored", prompt=prompt, continuation=" Tarnovik").json()
    assert all(score["greedy"])
    assert score["token_ids"] == made["token_ids"][: len(score["token_ids"])]
    wrong = server.post("/score", tenant="scored", prompt=prompt, continuation=" Zelvograd").json()
    assert sum(wrong["logprobs"]) < sum(score["logprobs"]) - 1


def test_a_long_text_becomes_several_blocks(server: ServerProcess) -> None:
    generator = FactGenerator(5, held_out=True, relations=ASKED)
    facts = [generator.fact() for _ in range(12)]
    text = " ".join(fact.statement for fact in facts)
    answer = server.update("long", text, idempotency_key="once")
    assert answer["blocks"] > 1
    assert answer["memory_version"] == answer["blocks"]
    again = server.update("long", text, idempotency_key="once")
    assert (again["memory_version"], again["replayed"]) == (answer["memory_version"], True)
    history = server.http.get("/tenants/long/history").json()
    kept = [u["text"] for u in reversed(history["updates"])]
    assert " ".join("".join(kept).split()) == " ".join(text.split())
    assert server.version("long") == answer["blocks"]


def test_short_texts_are_refused_or_repeated(server: ServerProcess) -> None:
    refused = server.post("/update", tenant="short", text="Hi.")
    assert refused.status_code == 422
    assert refused.json()["error"]["code"] == "context_too_short"
    assert server.http.get("/tenants/short").status_code == 404
    repeated = server.update("short", "Hi.", short="repeat")
    assert repeated["memory_version"] == 1
    assert repeated["tokens"] >= 16


def test_a_client_that_goes_away_ends_its_generation(server: ServerProcess) -> None:
    def metric(name: str) -> float:
        for line in server.http.get("/metrics").text.splitlines():
            if line.startswith(f"memoryllm_{name} "):
                return float(line.split()[1])
        return 0.0

    body = {"tenant": "gone", "prompt": "The", "max_tokens": 4000, "ignore_eos": True, "stream": True}
    with (
        httpx.Client(base_url=server.url, timeout=30.0, trust_env=False) as http,
        http.stream("POST", "/generate", json=body) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        until(lambda: metric("num_requests_running") == 1, "the generation running")
        before = metric("generation_tokens_total")
    until(lambda: metric("num_requests_running") == 0, "the generation's end")
    assert metric("generation_tokens_total") < before + 3900


def test_a_full_disk_refuses_updates_and_reading_goes_on(server: ServerProcess) -> None:
    server.update("disk", "Mira Tolvan lives in Tarnovik.")
    worker = server.worker_pid
    soft, hard = resource.prlimit(worker, resource.RLIMIT_FSIZE)
    # no file of the worker may grow past 1 KiB: a block takes more
    resource.prlimit(worker, resource.RLIMIT_FSIZE, (1024, hard))
    try:
        refused = server.post("/update", tenant="disk", text="Jona Brandt works at Kessler Mills.")
        assert refused.status_code == 507
        assert refused.json()["error"]["code"] == "store_full"
        assert ask(server, "disk", "Where does Mira Tolvan live?") == "Tarnovik"
        assert server.version("disk") == 1
    finally:
        resource.prlimit(worker, resource.RLIMIT_FSIZE, (soft, hard))
    assert server.update("disk", "Jona Brandt works at Kessler Mills.")["memory_version"] == 2


BAD: list[tuple[str, bytes, str]] = [
    (
        "unknown field",
        b'{"tenant":"bad","text":"SECRETTEXT is long enough for it.","colour":1}',
        "application/json",
    ),
    ("wrong type", b'{"tenant":"bad","text":17}', "application/json"),
    ("NaN", b'{"tenant":"bad","prompt":"SECRETTEXT","temperature":NaN}', "application/json"),
    ("infinite", b'{"tenant":"bad","prompt":"SECRETTEXT","temperature":1e999}', "application/json"),
    ("lone surrogate", b'{"tenant":"bad","text":"SECRETTEXT \\ud800 and so on and on"}', "application/json"),
    ("NUL", b'{"tenant":"bad","text":"SECRETTEXT \\u0000 and so on and on"}', "application/json"),
    ("invalid UTF-8", b'{"tenant":"bad","text":"SECRETTEXT \xff and so on and on"}', "application/json"),
    ("empty text", b'{"tenant":"bad","text":""}', "application/json"),
    ("id out of vocabulary", b'{"tenant":"bad","text":[1,2,3,4,5,6,7,8,99999999]}', "application/json"),
    ("negative id", b'{"tenant":"bad","text":[1,2,3,4,5,6,7,8,-1]}', "application/json"),
    ("nested", b'{"tenant":"bad","text":' + b"[" * 1000 + b"]" * 1000 + b"}", "application/json"),
    ("no JSON", b"SECRETTEXT", "application/json"),
    ("empty body", b"", "application/json"),
    ("content type", b'{"tenant":"bad","text":"SECRETTEXT is long enough for it."}', "text/plain"),
    ("too large", b'{"tenant":"bad","text":"' + b"SECRETTEXT " * 800_000 + b'"}', "application/json"),
    ("over-long text", b'{"tenant":"bad","text":"' + b"SECRETTEXT " * 100_000 + b'"}', "application/json"),
]


@pytest.mark.parametrize(("what", "body", "kind"), BAD, ids=[what for what, _, _ in BAD])
@pytest.mark.parametrize("path", ["/update", "/generate", "/score"])
def test_bad_requests_are_refused_and_change_nothing(
    server: ServerProcess, path: str, what: str, body: bytes, kind: str
) -> None:
    answer = server.http.post(path, content=body, headers={"content-type": kind})
    assert 400 <= answer.status_code < 500, what
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "code", "param"}
    assert "SECRETTEXT" not in answer.text
    assert server.http.get("/tenants/bad").status_code == 404
