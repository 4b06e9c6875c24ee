"""/tenants: names of every kind, pages, memory, history, erasure."""

from __future__ import annotations

from urllib.parse import quote

import pytest

from app.messages import CreateTenant, GetHistory, GetTenant, ListTenants
from tests.api.conftest import Service
from tests.api.test_bad_input import check_error

pytestmark = pytest.mark.anyio

NAMES = [
    "alice",
    "a@b.example",
    "a/b",
    "a b",
    "..a",
    "50%",
    "%2F",
    "?x#y",
    "東京",
    "👩‍👩‍👧",
    "é",
    "e\u0301",
    "a" * 256,
    "日" * 256,
]


@pytest.mark.parametrize("name", NAMES)
async def test_any_printable_name(service: Service, name: str) -> None:
    made = await service.post("/tenants", {"id": name, "seed": 2**40 - 1})
    assert made.status_code == 201
    assert made.json() == {
        "id": name,
        "seed": 2**40 - 1,
        "memory_version": 0,
        "created": 1.0,
        "updated": 2.0,
        "bytes": 100,
        "tier": "resident",
        "lineage": 0,
    }
    path = f"/tenants/{quote(name, safe='')}"
    looked = await service.http.get(path)
    no_limits = {"updates_per_day": 0, "bytes": 0, "concurrent": 0}
    assert looked.json() == made.json() | {"limits": no_limits}
    assert (await service.http.get(f"{path}/memory")).json()["tenant"] == name
    assert (await service.http.get(f"{path}/history")).json()["tenant"] == name
    assert (await service.http.delete(path)).json()["id"] == name
    assert [request.tenant for request in service.seen] == [name] * 5  # type: ignore[union-attr]
    check_error(await service.http.get(path), 404, "tenant_not_found")


async def test_no_seed_is_left_to_the_worker(service: Service) -> None:
    await service.post("/tenants", {"id": "alice"})
    (sent,) = service.seen
    assert isinstance(sent, CreateTenant)
    assert sent.seed is None


async def test_a_tenant_that_exists(service: Service) -> None:
    await service.post("/tenants", {"id": "alice"})
    check_error(await service.post("/tenants", {"id": "alice"}), 409, "tenant_exists", "id")


async def test_pages(service: Service) -> None:
    for number in range(5):
        await service.post("/tenants", {"id": f"t{number}"})
    first = (await service.http.get("/tenants", params={"limit": 2})).json()
    assert first == {"tenants": ["t0", "t1"], "next": "t1", "total": 5}
    last = (await service.http.get("/tenants", params={"limit": 3, "after": first["next"]})).json()
    assert last == {"tenants": ["t2", "t3", "t4"], "next": None, "total": 5}
    sent = service.seen[-1]
    assert isinstance(sent, ListTenants)
    assert (sent.after, sent.limit) == ("t1", 3)


async def test_erasure_gives_a_receipt(service: Service) -> None:
    await service.post("/tenants", {"id": "alice"})
    receipt = await service.http.delete("/tenants/alice")
    assert receipt.json() == {
        "id": "alice",
        "erased": True,
        "memory_version": 0,
        "blobs": 1,
        "bytes": 100,
        "cancelled": 0,
        "files": 0,
        "tiers": ["warm"],
    }


async def test_memory(service: Service) -> None:
    await service.post("/update", {"tenant": "alice", "text": list(range(60))})
    view = (await service.http.get("/tenants/alice/memory")).json()
    assert (view["memory_version"], view["num_blocks"], view["num_tokens"]) == (2, 4, 8)
    assert view["layers"] == [
        {
            "layer": 0,
            "versions": [
                {"version": 0, "age": 2, "tokens": 24, "share": 0.75},
                {"version": 2, "age": 0, "tokens": 8, "share": 0.25},
            ],
        },
        {
            "layer": 1,
            "versions": [
                {"version": 0, "age": 2, "tokens": 26, "share": 0.8125},
                {"version": 2, "age": 0, "tokens": 6, "share": 0.1875},
            ],
        },
    ]
    assert "born" not in view
    ranks = (await service.http.get("/tenants/alice/memory?detail=ranks")).json()
    assert ranks["born"] == [[0] * 24 + [2] * 8, [0] * 26 + [2] * 6]
    assert ranks["layers"] == view["layers"]


async def test_history(service: Service) -> None:
    await service.post("/update", {"tenant": "alice", "text": list(range(90))})
    told = (await service.http.get("/tenants/alice/history?limit=2")).json()
    assert [item["memory_version"] for item in told["updates"]] == [3, 2]
    assert told["updates"][0] == {
        "memory_version": 3,
        "time": 1.0,
        "tokens": 10,
        "text": None,
        "idempotency_key": None,
        "surviving_share": 0.5,
    }
    rest = (await service.http.get(f"/tenants/alice/history?before={told['next']}")).json()
    assert [item["memory_version"] for item in rest["updates"]] == [1]
    assert rest["next"] is None
    sent = service.seen[-1]
    assert isinstance(sent, GetHistory)
    assert (sent.before, sent.limit) == (2, 100)


async def test_a_name_is_sent_as_it_is_meant(service: Service) -> None:
    await service.http.get("/tenants/a%2Fb%20c%25")
    (sent,) = service.seen
    assert isinstance(sent, GetTenant)
    assert sent.tenant == "a/b c%"
