"""Whatever is wrong with a request: a 4xx in the one shape, none of its text in the answer, nothing to the worker."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.api.conftest import Service
from tests.api.fake_worker import MAX_SEQUENCE, MIN_CONTEXT, VOCAB

pytestmark = pytest.mark.anyio

# stands in every bad request and must never come back
SECRET = "Xyzzy7"
JSON = {"content-type": "application/json"}
MB8 = 8 * 2**20 - 100


def check_error(response: Any, status: int, code: str | None = None, param: str | None = None) -> None:
    assert response.status_code == status, response.text[:500]
    assert response.headers["content-type"] == "application/json"
    assert SECRET not in response.text
    body = response.json()
    assert set(body) == {"error", "request_id"}
    assert set(body["error"]) == {"message", "type", "code", "param"}
    assert body["request_id"] == response.headers["x-request-id"]
    assert body["error"]["message"]
    if code is not None:
        assert body["error"]["code"] == code
    if param is not None:
        assert body["error"]["param"] == param


U = {"tenant": SECRET, "text": f"{SECRET} " * 8}
G = {"tenant": SECRET, "prompt": SECRET}
S = {"tenant": SECRET, "prompt": SECRET, "continuation": SECRET}
MESSAGES = [{"role": "user", "content": SECRET}]

WRONG: list[tuple[str, dict[str, Any], str | None]] = [
    # unknown and missing fields, two ways to say the same
    ("/update", {**U, SECRET: 1}, None),
    ("/update", {**U, **{f"{SECRET}{i}": 1 for i in range(100)}}, None),
    ("/update", {"tenant": SECRET}, None),
    ("/update", {"text": SECRET}, "tenant"),
    ("/update", {**U, "messages": MESSAGES}, None),
    ("/generate", {**G, SECRET: None}, None),
    ("/generate", {"tenant": SECRET}, None),
    ("/generate", {**G, "messages": MESSAGES}, None),
    ("/score", {**S, SECRET: 1}, None),
    ("/score", {"tenant": SECRET, "prompt": SECRET}, "continuation"),
    ("/tenants", {"id": SECRET, SECRET: 1}, None),
    # wrong types, which must not be taken for what they resemble
    ("/update", {**U, "text": 5}, "text"),
    ("/update", {**U, "text": {"x": SECRET}}, "text"),
    ("/update", {**U, "text": [SECRET]}, "text.0"),
    ("/update", {**U, "text": [1.0] * 9}, "text.0"),
    ("/update", {**U, "text": [True] * 9}, "text.0"),
    ("/update", {**U, "text": ["5"] * 9}, "text.0"),
    ("/update", {**U, "stream": "yes"}, "stream"),
    ("/update", {**U, "stream": 1}, "stream"),
    ("/update", {**U, "short": SECRET}, "short"),
    ("/update", {**U, "idempotency_key": 5}, "idempotency_key"),
    ("/update", {**U, "idempotency_key": ""}, "idempotency_key"),
    ("/update", {**U, "idempotency_key": SECRET * 100}, "idempotency_key"),
    ("/generate", {**G, "max_tokens": "5"}, "max_tokens"),
    ("/generate", {**G, "max_tokens": 5.0}, "max_tokens"),
    ("/generate", {**G, "max_tokens": True}, "max_tokens"),
    ("/generate", {**G, "max_tokens": 0}, "max_tokens"),
    ("/generate", {**G, "max_tokens": -1}, "max_tokens"),
    ("/generate", {**G, "max_tokens": 10**30}, "max_tokens"),
    ("/generate", {**G, "temperature": -0.1}, "temperature"),
    ("/generate", {**G, "temperature": "hot"}, "temperature"),
    ("/generate", {**G, "top_p": 0}, "top_p"),
    ("/generate", {**G, "top_p": 1.1}, "top_p"),
    ("/generate", {**G, "top_k": -1}, "top_k"),
    ("/generate", {**G, "min_p": 2}, "min_p"),
    ("/generate", {**G, "repetition_penalty": 0}, "repetition_penalty"),
    ("/generate", {**G, "seed": -1}, "seed"),
    ("/generate", {**G, "seed": 2**63}, "seed"),
    ("/generate", {**G, "logprobs": 21}, "logprobs"),
    ("/generate", {**G, "logprobs": True}, "logprobs"),
    ("/generate", {**G, "stop": ""}, "stop"),
    ("/generate", {**G, "stop": [""]}, "stop.0"),
    ("/generate", {**G, "stop": [SECRET] * 9}, "stop"),
    ("/generate", {**G, "stop": SECRET * 100}, "stop"),
    ("/generate", {**G, "timeout": 0}, "timeout"),
    ("/generate", {**G, "priority": 10**9}, "priority"),
    ("/generate", {"tenant": SECRET, "messages": []}, "messages"),
    ("/generate", {"tenant": SECRET, "messages": [{"role": SECRET, "content": "x"}]}, "messages.0.role"),
    ("/generate", {"tenant": SECRET, "messages": [{"role": "user"}]}, "messages.0.content"),
    (
        "/generate",
        {"tenant": SECRET, "messages": [{"role": "user", "content": [SECRET]}]},
        "messages.0.content",
    ),
    ("/generate", {"tenant": SECRET, "messages": [{**MESSAGES[0], SECRET: 1}]}, "messages.0"),
    ("/tenants", {"id": SECRET, "seed": -1}, "seed"),
    ("/tenants", {"id": SECRET, "seed": 2**40}, "seed"),
    ("/tenants", {"id": SECRET, "seed": 1.5}, "seed"),
    # empty, and NUL
    ("/update", {**U, "text": ""}, "text"),
    ("/update", {**U, "text": []}, "text"),
    ("/update", {**U, "text": f"{SECRET}\0 " * 9}, "text"),
    ("/update", {**U, "idempotency_key": "a\0"}, "idempotency_key"),
    ("/generate", {**G, "prompt": ""}, "prompt"),
    ("/generate", {**G, "prompt": []}, "prompt"),
    ("/generate", {**G, "prompt": f"{SECRET}\0"}, "prompt"),
    ("/generate", {**G, "stop": "\0"}, "stop"),
    ("/score", {**S, "continuation": ""}, "continuation"),
    ("/score", {**S, "prompt": "\0"}, "prompt"),
    # outside the vocabulary
    ("/update", {**U, "text": [VOCAB] * 9}, "text"),
    ("/update", {**U, "text": [-1] * 9}, "text.0"),
    ("/update", {**U, "text": [2**80] * 9}, "text.0"),
    ("/generate", {**G, "prompt": [1, VOCAB]}, "prompt"),
    ("/generate", {**G, "prompt": [-1]}, "prompt.0"),
    ("/score", {**S, "continuation": [VOCAB]}, "continuation"),
    # tenants' names
    ("/update", {**U, "tenant": ""}, "tenant"),
    ("/update", {**U, "tenant": 5}, "tenant"),
    ("/update", {**U, "tenant": None}, "tenant"),
    ("/update", {**U, "tenant": "a" * 257}, "tenant"),
    ("/update", {**U, "tenant": f"{SECRET}\n"}, "tenant"),
    ("/update", {**U, "tenant": f"{SECRET}\0"}, "tenant"),
    ("/update", {**U, "tenant": f"{SECRET}\u2028"}, "tenant"),
    ("/generate", {**G, "tenant": ".."}, "tenant"),
    ("/score", {**S, "tenant": "."}, "tenant"),
    ("/tenants", {"id": "\x7f"}, "id"),
]


@pytest.mark.parametrize(("path", "body", "param"), WRONG)
async def test_wrong_field(service: Service, path: str, body: dict[str, Any], param: str | None) -> None:
    response = await service.post(path, body)
    check_error(response, 422, "invalid_request", param)
    assert service.seen == []


@pytest.mark.parametrize(
    ("path", "body", "code", "param"),
    [
        ("/update", {**U, "text": "Lisbon."}, "context_too_short", "text"),
        ("/update", {**U, "text": [5] * (MIN_CONTEXT - 1)}, "context_too_short", "text"),
        ("/update", {**U, "text": [5] * 401}, "too_many_tokens", "text"),
        ("/update", {**U, "text": f"{SECRET} " * 400}, "too_many_tokens", "text"),
        ("/generate", {**G, "max_tokens": MAX_SEQUENCE}, "too_many_tokens", "prompt"),
        ("/generate", {**G, "prompt": [5] * MAX_SEQUENCE, "max_tokens": 1}, "too_many_tokens", "prompt"),
        ("/generate", {**G, "prompt": SECRET * MAX_SEQUENCE}, "too_many_tokens", "prompt"),
        (
            "/generate",
            {"tenant": SECRET, "messages": MESSAGES * MAX_SEQUENCE},
            "too_many_tokens",
            "messages",
        ),
        ("/score", {**S, "continuation": SECRET * MAX_SEQUENCE}, "too_many_tokens", "continuation"),
    ],
)
async def test_wrong_length(service: Service, path: str, body: dict[str, Any], code: str, param: str) -> None:
    check_error(await service.post(path, body), 422, code, param)
    assert service.seen == []


async def test_too_short_names_both_numbers(service: Service) -> None:
    response = await service.post("/update", {**U, "text": [5] * (MIN_CONTEXT - 1)})
    message = response.json()["error"]["message"]
    assert f"{MIN_CONTEXT - 1} tokens" in message
    assert f"at least {MIN_CONTEXT}" in message
    assert "repeat" in message


def generate_with(fragment: bytes) -> bytes:
    return b'{"tenant":"' + SECRET.encode() + b'","prompt":"x",' + fragment + b"}"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"' + SECRET.encode() + b'"',
        SECRET.encode(),
        b"5",
        b"\xef\xbb\xbf{}",
        b'{"tenant":"a"} ' + SECRET.encode(),
        b'{"tenant":"' + SECRET.encode() + b'\xff","prompt":"x"}',
        b'{"tenant":"\\ud800' + SECRET.encode() + b'","prompt":"x"}',
        b'{"tenant":"\\ude00\\ud83d","prompt":"' + SECRET.encode() + b'"}',
        b'{"tenant":"\xed\xa0\x80","prompt":"x"}',
        generate_with(b'"temperature":NaN'),
        generate_with(b'"temperature":Infinity'),
        generate_with(b'"temperature":-Infinity'),
        generate_with(b'"seed":' + b"9" * 10_000),
        generate_with(b'"x":' + b"[" * 1000 + b"]" * 1000),
        generate_with(b'"x":' + b'{"a":' * 1000 + b"1" + b"}" * 1000),
        b"[" * MB8,
        b"9" * MB8,
        b'"' + b"a" * MB8,
        generate_with(b'"seed":' + b"9" * (MB8 - 100)),
    ],
    ids=lambda body: f"{body[:40]!r}-{len(body)}",
)
async def test_malformed(service: Service, body: bytes) -> None:
    check_error(await service.http.post("/generate", content=body, headers=JSON), 400, "malformed_body")
    assert service.seen == []


@pytest.mark.parametrize(
    "body",
    [
        generate_with(b'"temperature":1e999'),
        b"{" + b",".join(b'"%d":1' % i for i in range(600_000)) + b"}",
        b'{"tenant":"a","prompt":[' + b"1," * 4_000_000 + b"1]}",
        b'{"tenant":"a","prompt":[' + b'"",' * 2_500_000 + b"1]}",
        b'{"tenant":"a","stop":[' + b"1," * 4_000_000 + b'1],"prompt":"x"}',
        b'{"tenant":"a","messages":[' + b"1," * 4_000_000 + b"1]}",
        b'{"tenant":"a","messages":[{' + b",".join(b'"%d":1' % i for i in range(600_000)) + b"}]}",
        b'{"tenant":"a","prompt":"' + b"a" * (MB8 - 100) + b'"}',
        b'{"tenant":"a","prompt":"' + b" " * (MB8 - 100) + b'"}',
        b'{"tenant":"a","prompt":"' + b"\\u0000" * 1_300_000 + b'"}',
        b'{"tenant":"' + b"a" * (MB8 - 100) + b'","prompt":"x"}',
    ],
    ids=lambda body: f"{body[:40]!r}-{len(body)}",
)
async def test_large_and_wrong(service: Service, body: bytes) -> None:
    """Errors stop at the first fault and long texts at the first token too many, so that none of it takes long."""
    check_error(await service.http.post("/generate", content=body, headers=JSON), 422)
    assert service.seen == []


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "multipart/form-data; boundary=x"},
        {"content-type": "application/jsonx"},
        {"content-type": ""},
        {"content-type": "application/json", "content-encoding": "gzip"},
    ],
)
@pytest.mark.parametrize("path", ["/update", "/generate", "/score", "/v1/completions", "/tenants"])
async def test_wrong_media_type(service: Service, path: str, headers: dict[str, str]) -> None:
    response = await service.http.post(path, content=json.dumps(G), headers=headers)
    check_error(response, 415, "unsupported_media_type")
    assert service.seen == []


async def test_media_type_with_charset(service: Service) -> None:
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    body = json.dumps({**G, "max_tokens": 2})
    assert (await service.http.post("/generate", content=body, headers=headers)).status_code == 200


@pytest.mark.parametrize("announced", [True, False])
async def test_body_over_the_limit(service: Service, announced: bool) -> None:
    chunk = SECRET.encode() * 10_000
    sent = 0

    async def chunks() -> Any:
        nonlocal sent
        while sent < 20 * 2**20:
            sent += len(chunk)
            yield chunk

    headers = {**JSON, **({"content-length": str(20 * 2**20)} if announced else {})}
    response = await service.http.post("/update", content=chunks(), headers=headers)
    check_error(response, 413, "body_too_large")
    # it was refused before it had all come in
    assert sent <= (len(chunk) if announced else service.settings.max_body_bytes + len(chunk))
    assert service.seen == []


@pytest.mark.parametrize("length", ["-1", SECRET, "9" * 40])
async def test_odd_content_length(service: Service, length: str) -> None:
    headers = {**JSON, "content-length": length}
    response = await service.http.post("/update", content=b"", headers=headers)
    assert response.status_code in (400, 413)
    check_error(response, response.status_code)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", f"/{SECRET}", 404),
        ("POST", f"/tenants/{SECRET}", 405),
        ("GET", "/generate", 405),
        ("POST", "/update/", 404),
        ("GET", "/tenants/", 404),
        ("GET", f"/tenants/{SECRET}/{SECRET}", 404),
        ("GET", f"/tenants/{SECRET}%00", 422),
        ("GET", f"/tenants/{SECRET}%ff", 422),
        ("GET", f"/tenants/{SECRET}%ed%a0%80", 422),
        ("GET", "/tenants/%2e%2e", 422),
        ("GET", "/tenants/" + "a" * 257, 422),
        ("GET", f"/tenants?limit={SECRET}", 422),
        ("GET", "/tenants?limit=0", 422),
        ("GET", "/tenants?limit=1001", 422),
        ("GET", "/tenants?after=%00", 422),
        ("GET", f"/tenants/{SECRET}/memory?detail={SECRET}", 422),
        ("GET", f"/tenants/{SECRET}/history?before=-1", 422),
        ("GET", f"/tenants/{SECRET}/history?limit=NaN", 422),
    ],
)
async def test_paths(service: Service, method: str, path: str, status: int) -> None:
    check_error(await service.http.request(method, path), status)
    assert service.seen == []


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", f"/tenants/{SECRET}"),
        ("DELETE", f"/tenants/{SECRET}"),
        ("GET", f"/tenants/{SECRET}/memory"),
        ("GET", f"/tenants/{SECRET}/history"),
    ],
)
async def test_unknown_tenant(service: Service, method: str, path: str) -> None:
    check_error(await service.http.request(method, path), 404, "tenant_not_found")


@pytest.mark.parametrize("field", ["text", "messages"])
async def test_text_without_tokenizer(bare: Service, field: str) -> None:
    value: Any = SECRET * 20 if field == "text" else MESSAGES
    check_error(await bare.post("/update", {"tenant": "a", field: value}), 422, "no_tokenizer", field)
    field = "prompt" if field == "text" else field
    check_error(await bare.post("/generate", {"tenant": "a", field: value}), 422, "no_tokenizer", field)
    assert bare.seen == []


async def test_score_and_stop_without_tokenizer(bare: Service) -> None:
    check_error(await bare.post("/score", {**S, "continuation": [1]}), 422, "no_tokenizer", "prompt")
    response = await bare.post("/generate", {**G, "prompt": [1], "stop": SECRET})
    check_error(response, 422, "no_tokenizer", "stop")
    assert bare.seen == []


async def test_unhandled_error_is_a_500_in_the_one_shape(service: Service, monkeypatch: Any) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError(SECRET)

    monkeypatch.setattr(type(service.client), "open", broken)
    check_error(await service.post("/generate", {**G, "max_tokens": 2}), 500, "internal_error")
