"""/tenants/{tenant}/…: a memory as a thing that is forked and rolled back."""

from __future__ import annotations

from fastapi import APIRouter, Request

from app.api.access import access_of, require
from app.api.admission import place_of
from app.api.answers import TenantAnswer
from app.api.body import JsonRoute
from app.api.schemas import ForkBody, RollbackBody
from app.api.services import Use
from app.api.tenants import Named, ask, tenant_answer
from app.api.worker import new_id
from app.messages import ForkTenant, RollbackTenant, TenantInfo

router = APIRouter(route_class=JsonRoute, prefix="/tenants", tags=["memories"])


@router.post(
    "/{tenant}/fork", status_code=201, summary="Copy a memory, as it is or as it was, to a new tenant"
)
async def fork(tenant: Named, body: ForkBody, request: Request, services: Use) -> TenantAnswer:
    """Seed and history go along, so that the same updates forget the same in both. Neither depends on the other."""
    require(request, body.target)
    message = ForkTenant(new_id(), tenant, body.target, body.version, access_of(request).limits.bytes)
    return tenant_answer(await ask(services, tenant, message, TenantInfo))


@router.post("/{tenant}/rollback", summary="Go back to an earlier version of a memory")
async def rollback(tenant: Named, body: RollbackBody, request: Request, services: Use) -> TenantAnswer:
    """Takes its turn behind the updates that came before it. Generations that run go on with what they read."""
    message = RollbackTenant(new_id(), tenant, body.version)
    return tenant_answer(await ask(services, tenant, message, TenantInfo, place_of(request)))
