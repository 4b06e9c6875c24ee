"""The OpenAPI document, and requests made from it at random: never a 500, always as the document says."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from app import messages as m
from app.api.app import create_app
from app.api.tokens import Tokenizer
from app.api.worker import WorkerClient
from app.settings import Settings
from tests.api.fake_worker import FakeWorker, model_info

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


@pytest.fixture(scope="module")
def described(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The document of an app whose worker works in whichever loop a request runs in."""
    fake, client = FakeWorker(), WorkerClient()

    def work(frame: bytes) -> None:
        for request in m.decode_requests(frame):
            client.received(m.decode_answers(m.encode(fake.handle(request))), 0.0)

    client.attach(lambda frame: asyncio.get_running_loop().call_soon(work, frame) and None, 0.0)
    client.model, client.tokenizer = model_info(str(model_dir)), Tokenizer.load(model_dir)
    spool = Settings(spool_dir=tmp_path_factory.mktemp("spool"))
    return schemathesis.openapi.from_asgi("/openapi.json", create_app(spool, client))


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("post", "/update"),
        ("post", "/generate"),
        ("post", "/score"),
        ("post", "/v1/chat/completions"),
        ("post", "/v1/completions"),
        ("get", "/v1/models"),
        ("get", "/v1/models/{model}"),
        ("post", "/tenants"),
        ("get", "/tenants"),
        ("get", "/tenants/{tenant}"),
        ("delete", "/tenants/{tenant}"),
        ("get", "/tenants/{tenant}/memory"),
        ("get", "/tenants/{tenant}/history"),
        ("post", "/tenants/{tenant}/fork"),
        ("post", "/tenants/{tenant}/rollback"),
        ("get", "/tenants/{tenant}/export"),
        ("post", "/tenants/{tenant}/import"),
        ("post", "/tenants/{tenant}/rebuild"),
    ],
)
def test_any_request(described: Any, method: str, path: str) -> None:
    @settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(case=described[path][method].as_strategy())
    def ask(case: Any) -> None:
        case.call_and_validate(checks=CHECKS)

    ask()


def test_the_document_describes_the_bodies() -> None:
    document = create_app(Settings(), WorkerClient()).openapi()
    paths = {path: set(methods) for path, methods in document["paths"].items()}
    assert paths == {
        "/update": {"post"},
        "/generate": {"post"},
        "/score": {"post"},
        "/v1/chat/completions": {"post"},
        "/v1/completions": {"post"},
        "/v1/models": {"get"},
        "/v1/models/{model}": {"get"},
        "/tenants": {"get", "post"},
        "/tenants/{tenant}": {"get", "delete"},
        "/tenants/{tenant}/memory": {"get"},
        "/tenants/{tenant}/history": {"get"},
        "/tenants/{tenant}/fork": {"post"},
        "/tenants/{tenant}/rollback": {"post"},
        "/tenants/{tenant}/export": {"get"},
        "/tenants/{tenant}/import": {"post"},
        "/tenants/{tenant}/rebuild": {"post"},
        "/": {"get"},
        "/health": {"get"},
        "/ready": {"get"},
        "/metrics": {"get"},
    }
    schemas = document["components"]["schemas"]
    for path, name in [
        ("/update", "UpdateBody"),
        ("/generate", "GenerateBody"),
        ("/score", "ScoreBody"),
        ("/v1/chat/completions", "ChatCompletionBody"),
        ("/v1/completions", "CompletionBody"),
    ]:
        body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert body == {"$ref": f"#/components/schemas/{name}"}
        assert schemas[name]["additionalProperties"] is False
        assert schemas[name]["examples"]
        errors = document["paths"][path]["post"]["responses"]["422"]["content"]["application/json"]["schema"]
        assert errors == {"$ref": "#/components/schemas/ErrorAnswer"}
