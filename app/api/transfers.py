"""GET /tenants/{tenant}/export and POST /tenants/{tenant}/import: a memory as a file, streamed both ways."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress

from fastapi import APIRouter, Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from app.api.access import access_of
from app.api.answers import TenantAnswer
from app.api.arrival import Arrival
from app.api.body import check_content_type
from app.api.services import Services, Use
from app.api.spool import CHUNK, Spool, SpoolFile
from app.api.stream import ClientGone
from app.api.streaming import watched
from app.api.tenants import Named, ask, tenant_answer
from app.api.worker import new_id
from app.errors import (
    BodyTooLarge,
    MalformedBody,
    ServiceError,
    TenantExists,
    TenantNotFound,
)
from app.messages import Exported, ExportTenant, GetTenant, ImportTenant, Reply, TenantInfo

router = APIRouter(prefix="/tenants", tags=["memories"])

# a transfer has a file on the disk: one that stands still must not keep it
STALLED_SECONDS = 60.0
MEDIA_TYPE = "application/octet-stream"
_FILE = {MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}}


@router.get(
    "/{tenant}/export",
    response_class=Response,
    responses={200: {"content": _FILE, "description": "a safetensors file"}},
    summary="A memory as a safetensors file",
)
async def export(tenant: Named, request: Request, services: Use, texts: bool = False) -> Response:
    """The pool in the layout of the reference's checkpoints, as it is now, with all that an import needs.

    ``texts`` puts the kept texts of its updates into the file's metadata.
    """
    return FileStream(_exported(tenant, request, services, texts))


async def _exported(
    tenant: str, request: Request, services: Services, texts: bool
) -> AsyncGenerator[tuple[Exported, SpoolFile]]:
    spool = services.spool
    with spool.file(tenant, _key(request)) as file:
        client = services.workers.of(tenant)
        async with spool.working:
            with client.open(ExportTenant(new_id(), tenant, str(file.path), texts)) as stream:
                async with watched(request, stream):
                    part = await stream.next()
        assert isinstance(part, Reply)
        assert isinstance(part.body, Exported)
        file.unlink()
        yield part.body, file


class FileStream(Response):
    """Sends the file that ``exported`` yields once it is whole. An error before that is answered as any other."""

    media_type = MEDIA_TYPE

    def __init__(self, exported: AsyncGenerator[tuple[Exported, SpoolFile]]) -> None:
        super().__init__()
        self._exported = exported

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._exported) as exported:
            told, file = await anext(exported)
            version = told.memory_version
            self.headers["content-length"] = str(told.bytes)
            self.headers["content-disposition"] = f'attachment; filename="memory-{version}.safetensors"'
            self.headers["x-memory-version"] = str(version)
            self.headers["cache-control"] = "no-store"
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            # where this ends early the connection is cut: half a file must not pass for a whole one
            with suppress(ServiceError, TimeoutError, OSError):
                await _send_file(file, told.bytes, receive, send)


async def _send_file(file: SpoolFile, left: int, receive: Receive, send: Send) -> None:
    """Raises TenantErased, TimeoutError, OSError. Ends early if the client has gone."""
    gone = asyncio.create_task(_disconnected(receive))
    try:
        while left and not gone.done():
            piece = await asyncio.to_thread(file.read)
            left -= len(piece)
            if not piece:
                return
            async with asyncio.timeout(STALLED_SECONDS):
                await send({"type": "http.response.body", "body": piece, "more_body": left > 0})
    finally:
        gone.cancel()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


@router.post(
    "/{tenant}/import",
    status_code=201,
    openapi_extra={"requestBody": {"required": True, "content": _FILE}},
    summary="Make a tenant of an exported memory",
)
async def import_(tenant: Named, request: Request, services: Use) -> TenantAnswer:
    """The body is the file. It is checked whole before anything is stored; the tenant must not exist.

    Seed and version are those of the export, so that the same updates make the same memory.
    """
    check_content_type(request, MEDIA_TYPE)
    model = services.workers.of(tenant).require()
    announced = request.headers.get("content-length", "")
    if announced.isascii() and announced.isdigit() and int(announced[:20]) > model.memory_file_bytes:
        raise _too_large(model.memory_file_bytes)
    await _check_absent(services, tenant)
    spool: Spool = services.spool
    with spool.file(tenant, _key(request)) as file:
        await _receive(request, file, model.memory_file_bytes)
        async with spool.working:
            file.check()
            message = ImportTenant(new_id(), tenant, str(file.path), access_of(request).limits.bytes)
            return tenant_answer(await ask(services, tenant, message, TenantInfo))


async def _check_absent(services: Services, tenant: str) -> None:
    """Raises TenantExists before gigabytes have been sent for nothing."""
    try:
        await ask(services, tenant, GetTenant(new_id(), tenant), TenantInfo)
    except TenantNotFound:
        return
    raise TenantExists("this tenant exists already")


async def _receive(request: Request, file: SpoolFile, most: int) -> None:
    """The body into the file. Raises BodyTooLarge, MalformedBody, RequestTooSlow, StoreFull, TenantErased."""
    taken, pieces = 0, aiter(request.stream())
    arrival = Arrival(STALLED_SECONDS)
    while True:
        pending = bytearray()
        try:
            while len(pending) < CHUNK and (piece := await arrival.piece(anext(pieces, None))) is not None:
                arrival.came(len(piece))
                pending += piece
                if taken + len(pending) > most:
                    raise _too_large(most)
        except ClientDisconnect:
            raise ClientGone from None
        if not pending:
            break
        taken += len(pending)
        await asyncio.to_thread(file.write, pending)
    if not taken:
        raise MalformedBody("the body is empty; an exported memory is expected")


def _key(request: Request) -> str | None:
    key = access_of(request).key
    return None if key is None else key.id


def _too_large(most: int) -> BodyTooLarge:
    return BodyTooLarge(f"the file is larger than the {most:,} bytes that a memory of this model can take")
