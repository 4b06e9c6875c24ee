"""Operations: /health, /ready, /metrics, and what is at /."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

from app.api.answers import HealthAnswer, ReadyAnswer, RootAnswer
from app.api.services import Use
from app.errors import WorkerUnavailable

NAME = "memoryllm-serve"

# HEAD is for those who look only whether it is there; uvicorn leaves the body out
router = APIRouter(tags=["operations"])


def installed_version() -> str:
    try:
        return version(NAME)
    except PackageNotFoundError:
        return "0"


@router.head("/", include_in_schema=False)
@router.get("/", summary="Where things are")
async def root() -> RootAnswer:
    links = {name: f"/{name}" for name in ("docs", "health", "ready", "metrics", "tenants")}
    return RootAnswer(name=NAME, version=installed_version(), links=links)


@router.head("/health", include_in_schema=False)
@router.get("/health", summary="Whether the server's process lives")
async def health() -> HealthAnswer:
    return HealthAnswer()


@router.head("/ready", include_in_schema=False)
@router.get("/ready", responses={503: {"model": ReadyAnswer}}, summary="Whether requests are served")
async def ready(services: Use, response: Response) -> ReadyAnswer:
    """503 while the model is loaded, after a worker's death, and while the server shuts down."""
    try:
        models = [client.require() for client in services.workers.clients]
    except WorkerUnavailable as error:
        response.status_code = 503
        response.headers["retry-after"] = "1"
        return ReadyAnswer(ready=False, version=installed_version(), reason=error.message)
    model = models[0]
    return ReadyAnswer(
        ready=True,
        model=model.name,
        device=model.device,
        dtype=model.dtype,
        fingerprint=model.fingerprint,
        version=installed_version(),
    )


@router.head("/metrics", include_in_schema=False)
@router.get("/metrics", response_class=Response, summary="Prometheus metrics")
async def metrics(services: Use) -> Response:
    return Response(services.metrics.render(), media_type=CONTENT_TYPE_LATEST)
