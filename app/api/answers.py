"""What the API answers with; in /docs these are the response schemas."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field
from starlette.responses import Response

from app import messages


def answered(answer: BaseModel, *, exclude_none: bool = False) -> Response:
    """The answer as it is: FastAPI would check once more what has just been made."""
    return Response(answer.model_dump_json(exclude_none=exclude_none), media_type="application/json")


class ErrorDetail(BaseModel):
    message: str
    type: str
    code: str = Field(description="a stable word a program can test for")
    param: str | None = Field(description="the field at fault")


class ErrorAnswer(BaseModel):
    error: ErrorDetail
    request_id: str


class UpdateTimings(BaseModel):
    """Seconds since the worker took the update."""

    queue: float = Field(description="waiting, loading included")
    load: float = Field(description="of that, bringing the memory to the device")
    total: float


class Timings(BaseModel):
    """Seconds since the worker took the generation."""

    queue: float = Field(description="waiting, loading included")
    load: float = Field(description="of that, bringing the memory to the device")
    first_token: float
    total: float


def timings(of: messages.Timings) -> Timings:
    """To the microsecond: what a clock says beyond that is noise."""
    own = update_timings(of)
    return Timings(queue=own.queue, load=own.load, first_token=round(of.first_token, 6), total=own.total)


def update_timings(of: messages.Timings) -> UpdateTimings:
    """As ``timings``: an update has no first token."""
    return UpdateTimings(queue=round(of.queue, 6), load=round(of.load, 6), total=round(of.total, 6))


class UpdateAnswer(BaseModel):
    tenant: str
    memory_version: int
    blocks: int
    tokens: int
    surviving_share: float = Field(
        description="expected share of this update's memory tokens still in the pool"
    )
    timings: UpdateTimings
    replayed: bool = Field(description="the idempotency key had done this update before")
    short: Literal["none", "repeated"] = Field(description="what was done with a text that was too short")


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TopToken(BaseModel):
    token_id: int
    token: str
    logprob: float


class TokenLogprob(TopToken):
    top: list[TopToken]


class Summary(BaseModel):
    """How a generation ended."""

    finish_reason: str = Field(description="stop, length or cancelled")
    stop_reason: str | None = Field(None, description="the stop string that ended it")
    usage: Usage
    memory_version: int = Field(description="the version that the whole generation read")
    timings: Timings


class GenerateAnswer(Summary):
    id: str
    tenant: str
    text: str
    token_ids: list[int] | None = None
    logprobs: list[TokenLogprob] | None = None


class GenerateChunk(BaseModel):
    """One event of a streamed generation. The last one has everything below ``logprobs`` too."""

    text: str
    token_ids: list[int] | None = None
    logprobs: list[TokenLogprob] | None = None
    id: str | None = None
    tenant: str | None = None
    finish_reason: str | None = None
    stop_reason: str | None = None
    usage: Usage | None = None
    memory_version: int | None = None
    timings: Timings | None = None


class ScoreAnswer(BaseModel):
    tenant: str
    logprobs: list[float] = Field(description="natural logarithms, one per continuation token")
    greedy: list[bool] = Field(description="whether the token is the model's own first choice")
    greedy_token_ids: list[int]
    token_ids: list[int]
    memory_version: int


class TenantAnswer(BaseModel):
    id: str
    seed: int
    memory_version: int
    created: float = Field(description="Unix seconds")
    updated: float
    bytes: int = Field(description="in the store")
    tier: str = Field(description="where the pool is now: resident, warm or cold")
    lineage: int = Field(
        description="how often the memory was rolled back or rebuilt; with memory_version it names one content"
    )


class LimitsAnswer(BaseModel):
    """0: no limit."""

    updates_per_day: int = Field(description="contexts within 24 hours")
    bytes: int = Field(description="in the store")
    concurrent: int = Field(description="requests at once")


class TenantView(TenantAnswer):
    limits: LimitsAnswer = Field(description="what the asking key's requests for this tenant are held to")


class RebuildAnswer(TenantAnswer):
    rebuilt: bool = Field(description="false: it was the served model's already, and nothing was done")
    blocks: int = Field(description="of the kept texts")
    tokens: int


class TenantsAnswer(BaseModel):
    tenants: list[str]
    next: str | None = Field(description="pass it as after for the following page")
    total: int


class ErasedAnswer(BaseModel):
    """The receipt of an erasure."""

    id: str
    erased: Literal[True] = True
    memory_version: int
    blobs: int
    bytes: int
    cancelled: int = Field(description="open requests that were ended, exports and imports among them")
    files: int = Field(description="files of its exports and imports that were emptied and removed")
    tiers: list[str] = Field(
        description="where the pool was besides the store, of resident and warm; what it left there is overwritten"
    )


class VersionShare(BaseModel):
    version: int = Field(description="the update that wrote these tokens; 0 is the checkpoint's own pool")
    age: int = Field(description="updates since")
    tokens: int
    share: float


class LayerMemory(BaseModel):
    layer: int | None = Field(description="null: the same in every layer")
    versions: list[VersionShare]


class MemoryAnswer(BaseModel):
    tenant: str
    memory_version: int
    num_blocks: int
    num_tokens: int
    layers: list[LayerMemory]
    born: list[list[int]] | None = Field(
        None, description="with detail=ranks: the version that wrote each rank, oldest rank first, by layer"
    )


class HistoryEntry(BaseModel):
    memory_version: int
    time: float
    tokens: int
    text: str | None
    idempotency_key: str | None
    surviving_share: float


class HistoryAnswer(BaseModel):
    tenant: str
    memory_version: int
    updates: list[HistoryEntry]
    next: int | None = Field(description="pass it as before for the following page")


class HealthAnswer(BaseModel):
    status: Literal["ok"] = "ok"


class ReadyAnswer(BaseModel):
    ready: bool
    model: str | None = None
    device: str | None = None
    dtype: str | None = None
    fingerprint: str | None = None
    version: str
    reason: str | None = None


class RootAnswer(BaseModel):
    name: str
    version: str
    links: dict[str, str]
