"""What an error tells those who would send the same request again."""

from __future__ import annotations

from typing import Any

import pytest

from app.api.errors import error_response
from app.api.middleware import LastResort
from app.errors import BY_CODE
from tests.api.conftest import Service
from tests.api.test_bad_input import check_error
from tests.api.test_transfers import OCTETS, Exchange

JSON = {"content-type": "application/json"}

# what OpenAI's clients repeat unless they are told not to; of these the ones that a repetition may help
REPEATED = {code for code, kind in BY_CODE.items() if kind.status in (408, 409, 429) or kind.status >= 500}
MAY_HELP = {
    "client_too_slow",
    "request_too_slow",
    "internal_error",
    "store_failed",
    "store_full",
    "server_overloaded",
    "worker_unavailable",
    "tenant_elsewhere",
}


@pytest.mark.parametrize("code", sorted(REPEATED))
def test_what_is_in_vain_is_not_to_be_repeated(code: str) -> None:
    told = error_response(BY_CODE[code]("no"), "id").headers
    assert told.get("x-should-retry") == (None if code in MAY_HELP else "false")
    assert "retry-after" not in told
    # when it passes is known: then it is worth it, whatever it is
    told = error_response(BY_CODE[code]("no", retry_after=2.5), "id").headers
    assert told["retry-after"] == "3"
    assert "x-should-retry" not in told


def test_a_day_s_limit_is_not_asked_again_within_seconds() -> None:
    """OpenAI's clients heed no Retry-After that long: they ask again at once."""
    told = error_response(BY_CODE["quota_exceeded"]("no", retry_after=3600.0), "id").headers
    assert (told["retry-after"], told["x-should-retry"]) == ("3600", "false")
    # a server that has too much to do may be free sooner than it thought
    assert (
        "x-should-retry"
        not in error_response(BY_CODE["server_overloaded"]("no", retry_after=3600.0), "id").headers
    )


@pytest.mark.anyio
@pytest.mark.parametrize("begun", [False, True])
async def test_what_nothing_else_caught_is_answered_or_at_least_noted(begun: bool) -> None:
    sent: list[Any] = []

    async def breaks(scope: Any, receive: Any, send: Any) -> None:
        if begun:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ValueError("what nobody foresaw")

    async def send(message: Any) -> None:
        sent.append(message)

    scope: dict[str, Any] = {"type": "http", "request_id": "id"}
    await LastResort(breaks)(scope, None, send)  # type: ignore[arg-type]
    assert scope["error"].code == "internal_error"
    assert [message["status"] for message in sent if "status" in message] == [200 if begun else 500]
    assert "foresaw" not in str(sent)


@pytest.mark.anyio
@pytest.mark.parametrize("path", ["/generate", "/tenants/ada/import"])
async def test_a_client_that_goes_within_its_body_is_no_error(service: Service, path: str) -> None:
    exchange = Exchange(service, "POST", path, JSON if path == "/generate" else OCTETS)
    exchange.body(b"{", more=True)
    exchange.hang_up()
    await exchange.task
    # nobody is there to read it
    assert exchange.status == 499
    errors = service.client.metrics.errors
    assert not any(child._value.get() for child in errors._metrics.values())


@pytest.mark.anyio
async def test_it_is_told_over_http(service: Service) -> None:
    await service.post("/tenants", {"id": "alice"})
    again = await service.post("/tenants", {"id": "alice"})
    check_error(again, 409, "tenant_exists")
    assert again.headers["x-should-retry"] == "false"


@pytest.mark.anyio
async def test_programs_that_look_elsewhere_are_told_where_openais_protocol_is(service: Service) -> None:
    elsewhere = ["/chat/completions", "/completions", "/models", "/v1/responses", "/v1/embeddings"]
    elsewhere += ["/v1/v1/chat/completions", "/v1//chat/completions", "/api/v1/models", "/v1/models/"]
    for path in elsewhere:
        told = await service.http.get(path)
        check_error(told, 404, "not_found")
        message = told.json()["error"]["message"]
        assert "/v1/chat/completions" in message
        assert "ends in /v1" in message
    # what has nothing to do with it is told nothing of it
    for path in ("/nothing", "/tenants/a/models", "/v1/images", "/v1"):
        told = await service.http.get(path)
        check_error(told, 404, "not_found")
        assert told.json()["error"]["message"] == "there is nothing at this path"
