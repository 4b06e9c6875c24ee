"""What an error tells those who would send the same request again."""

from __future__ import annotations

import pytest

from app.api.errors import error_response
from app.errors import BY_CODE
from tests.api.conftest import Service
from tests.api.test_bad_input import check_error

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
