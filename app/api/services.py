"""What every endpoint needs, handed to it by FastAPI: the settings and the workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from app.api.metrics import Metrics
from app.api.spool import Spool
from app.api.worker import Workers
from app.settings import Settings


@dataclass(frozen=True)
class Services:
    settings: Settings
    workers: Workers
    metrics: Metrics
    spool: Spool


def services_of(request: Request) -> Services:
    """For the endpoints that are called most: what FastAPI hands over it looks for at every request."""
    services = request.app.state.services
    assert isinstance(services, Services)
    return services


async def _services(request: Request) -> Services:
    # a plain function would be called in a thread, at every request
    return services_of(request)


Use = Annotated[Services, Depends(_services)]
