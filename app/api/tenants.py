"""/tenants: create, list, look, erase; what a memory holds, and what was put into it."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Annotated, Literal, TypeVar
from urllib.parse import unquote

from fastapi import APIRouter, Depends, Path, Query, Request

from app.api.access import access_of, tenant_of
from app.api.admission import Place, place_of
from app.api.answers import (
    ErasedAnswer,
    HistoryAnswer,
    HistoryEntry,
    LayerMemory,
    LimitsAnswer,
    MemoryAnswer,
    TenantAnswer,
    TenantsAnswer,
    TenantView,
    VersionShare,
)
from app.api.body import JsonRoute
from app.api.schemas import MAX_TENANT, TenantBody, check_tenant
from app.api.services import Services, Use
from app.api.suspects import SERVER_KEY
from app.api.worker import new_id
from app.errors import InvalidRequest
from app.messages import (
    CreateTenant,
    Erased,
    EraseTenant,
    GetHistory,
    GetMemory,
    GetTenant,
    History,
    ListTenants,
    MemoryView,
    Question,
    Reply,
    TenantInfo,
    TenantList,
    Texts,
)

router = APIRouter(route_class=JsonRoute, prefix="/tenants", tags=["tenants"])

Body = TypeVar("Body", TenantInfo, TenantList, Erased, Texts, MemoryView, History)
Limit = Annotated[int, Query(ge=1, le=1000)]


def named(request: Request, tenant: Annotated[str, Path(min_length=1, description="percent-encoded")]) -> str:
    """The tenant in the path, which routing left encoded as it came."""
    try:
        name = check_tenant(unquote(tenant, errors="strict"))
    except UnicodeDecodeError:
        raise InvalidRequest("the tenant's id in the path is not UTF-8", param="tenant") from None
    except ValueError as error:
        raise InvalidRequest(str(error), param="tenant") from None
    return tenant_of(request, name)


Named = Annotated[str, Depends(named)]


async def ask(
    services: Services, tenant: str, question: Question, kind: type[Body], place: Place | None = None
) -> Body:
    """The answer of the tenant's worker. ``place`` is wanted for what waits in the scheduler's queues."""
    part = await services.workers.of(tenant).ask(question, place)
    assert isinstance(part, Reply)
    assert isinstance(part.body, kind)
    return part.body


def tenant_answer(info: TenantInfo) -> TenantAnswer:
    return TenantAnswer(
        id=info.tenant,
        seed=info.seed,
        memory_version=info.memory_version,
        created=info.created,
        updated=info.updated,
        bytes=info.bytes,
        tier=info.tier,
        lineage=info.lineage,
    )


@router.post("", status_code=201, summary="Make a tenant, with a seed of its own if need be")
async def create(body: TenantBody, request: Request, services: Use) -> TenantAnswer:
    """Not needed before an update: tenants come into being on first use."""
    tenant_of(request, body.id, param="id")
    info = await ask(services, body.id, CreateTenant(new_id(), body.id, body.seed), TenantInfo)
    return tenant_answer(info)


@router.get("", summary="A page of tenants, by name")
async def page(
    request: Request,
    services: Use,
    limit: Limit = 100,
    after: Annotated[str, Query(max_length=MAX_TENANT)] = "",
) -> TenantsAnswer:
    if after:
        try:
            check_tenant(after)
        except ValueError as error:
            raise InvalidRequest(str(error), param="after") from None
    place_of(request).enter_list()
    # of others nothing shows, their number neither
    only = access_of(request).bound
    listed = await ask(services, "", ListTenants(new_id(), after, limit, only), TenantList)
    return TenantsAnswer(tenants=listed.tenants, next=listed.next, total=listed.total)


@router.get("/{tenant}", summary="Look at a tenant")
async def look(tenant: Named, request: Request, services: Use) -> TenantView:
    info = await ask(services, tenant, GetTenant(new_id(), tenant), TenantInfo)
    limits = access_of(request).limits
    return TenantView(
        **tenant_answer(info).model_dump(),
        limits=LimitsAnswer(
            updates_per_day=limits.updates_per_day, bytes=limits.bytes, concurrent=limits.concurrent
        ),
    )


@router.delete("/{tenant}", summary="Erase a tenant and its memory")
async def erase(tenant: Named, request: Request, services: Use) -> ErasedAnswer:
    """Ends the tenant's open requests and removes it from the device, from the host's memory and from the store.

    A client that is being sent an export of it gets no further.
    """
    message = EraseTenant(new_id(), tenant, access_of(request).limits.updates_per_day)
    erased = await ask(services, tenant, message, Erased)
    return ErasedAnswer(
        id=erased.tenant,
        memory_version=erased.memory_version,
        blobs=erased.blobs,
        bytes=erased.bytes,
        cancelled=erased.cancelled,
        files=services.spool.revoke(tenant),
        tiers=erased.tiers,
    )


@router.get(
    "/{tenant}/memory", response_model_exclude_none=True, summary="Which updates the memory still holds"
)
async def memory(
    tenant: Named, services: Use, detail: Literal["summary", "ranks"] = "summary"
) -> MemoryAnswer:
    """Per layer, or once if all layers forget alike: how many memory tokens each update has left."""
    view = await ask(services, tenant, GetMemory(new_id(), tenant), MemoryView)
    # an 8B model's view has 400,000 numbers
    layers = await asyncio.to_thread(_layers, view)
    return MemoryAnswer(
        tenant=view.tenant,
        memory_version=view.memory_version,
        num_blocks=view.num_blocks,
        num_tokens=view.num_tokens,
        layers=layers,
        born=view.born if detail == "ranks" else None,
    )


def _layers(view: MemoryView) -> list[LayerMemory]:
    shared = len(view.born) == 1
    return [
        LayerMemory(
            layer=None if shared else number,
            versions=[
                VersionShare(
                    version=version,
                    age=view.memory_version - version,
                    tokens=count,
                    share=count / len(born),
                )
                for version, count in sorted(Counter(born).items())
            ],
        )
        for number, born in enumerate(view.born)
    ]


@router.get("/{tenant}/history", summary="The committed updates, newest first")
async def history(
    tenant: Named,
    services: Use,
    limit: Limit = 100,
    before: Annotated[int | None, Query(ge=0, lt=2**63)] = None,
) -> HistoryAnswer:
    told = await ask(services, tenant, GetHistory(new_id(), tenant, limit, before), History)
    return HistoryAnswer(
        tenant=told.tenant,
        memory_version=told.memory_version,
        updates=[
            HistoryEntry(
                memory_version=item.memory_version,
                time=item.time,
                tokens=item.tokens,
                text=item.text,
                idempotency_key=None
                if (item.idempotency_key or "").startswith(SERVER_KEY)
                else item.idempotency_key,
                surviving_share=item.surviving_share,
            )
            for item in told.updates
        ],
        next=told.next,
    )
