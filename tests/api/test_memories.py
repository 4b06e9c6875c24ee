"""A memory as a thing over HTTP: fork and rollback."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import pytest

from app.messages import ForkTenant, RollbackTenant
from tests.api.conftest import Service
from tests.api.test_bad_input import check_error

pytestmark = pytest.mark.anyio


async def test_fork(service: Service) -> None:
    await service.post("/update", {"tenant": "a/b", "text": list(range(60))})
    made = await service.post(f"/tenants/{quote('a/b', safe='')}/fork", {"target": "日本", "version": 1})
    assert made.status_code == 201
    assert (made.json()["id"], made.json()["memory_version"]) == ("日本", 1)
    whole = await service.post("/tenants/a%2Fb/fork", {"target": "whole"})
    assert whole.json()["memory_version"] == 2
    first, second = (request for request in service.seen if isinstance(request, ForkTenant))
    assert (first.tenant, first.target, first.version) == ("a/b", "日本", 1)
    assert (second.tenant, second.target, second.version) == ("a/b", "whole", None)
    check_error(await service.post("/tenants/a%2Fb/fork", {"target": "whole"}), 409, "tenant_exists")
    check_error(
        await service.post("/tenants/a%2Fb/fork", {"target": "x", "version": 3}), 404, "version_not_kept"
    )
    check_error(await service.post("/tenants/nobody/fork", {"target": "x"}), 404, "tenant_not_found")


async def test_rollback(service: Service) -> None:
    await service.post("/update", {"tenant": "alice", "text": list(range(60))})
    answer = await service.post("/tenants/alice/rollback", {"version": 1})
    assert answer.status_code == 200
    assert (answer.json()["memory_version"], answer.json()["lineage"]) == (1, 1)
    sent = service.seen[-1]
    assert isinstance(sent, RollbackTenant)
    assert (sent.tenant, sent.version) == ("alice", 1)
    check_error(await service.post("/tenants/alice/rollback", {"version": 2}), 404, "version_not_kept")
    check_error(await service.post("/tenants/nobody/rollback", {"version": 0}), 404, "tenant_not_found")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("fork", {}, "target"),
        ("fork", {"target": ""}, "target"),
        ("fork", {"target": "a\nb"}, "target"),
        ("fork", {"target": "x", "version": -1}, "version"),
        ("fork", {"target": "x", "version": 2**63}, "version"),
        ("fork", {"target": "x", "version": "1"}, "version"),
        ("fork", {"target": "x", "at": 1}, None),
        ("rollback", {}, "version"),
        ("rollback", {"version": None}, "version"),
        ("rollback", {"version": 1.5}, "version"),
        ("rollback", {"version": True}, "version"),
    ],
)
async def test_a_wrong_body_never_reaches_the_worker(
    service: Service, path: str, body: dict[str, Any], param: str | None
) -> None:
    check_error(await service.post(f"/tenants/alice/{path}", body), 422, "invalid_request", param)
    assert service.seen == []
