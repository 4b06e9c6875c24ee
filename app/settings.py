"""One frozen Settings object. Every field is also an environment variable: MEMORYLLM_HOST and so on."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PositiveFloat, PositiveInt
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://(?:[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::([0-9]{1,5}))?")
_HOST = re.compile(r"[a-z0-9_](?:[a-z0-9._-]*[a-z0-9_])?")
_USUAL_PORTS = {"http": "80", "https": "443"}


def parse_bytes(value: object) -> object:
    """``512``, ``"512MiB"``, ``"4GB"`` (binary units either way) -> bytes; anything else goes on to pydantic."""
    if isinstance(value, str):
        text = value.strip().upper().removesuffix("B").removesuffix("I")
        number, unit = (text[:-1], text[-1]) if text and text[-1] in "KMGT" else (text, "")
        try:
            return int(float(number) * _UNITS[unit])
        except (ValueError, OverflowError) as error:
            raise ValueError("a size looks like 512MiB or 4GiB") from error
    return value


def _printable(name: str) -> str:
    if not name.isprintable():
        raise ValueError("a name has printable characters only")
    return name


Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(ge=0, lt=2**63)]


def parse_list(value: object) -> object:
    """``"a, b"`` of a variable, ``["a", "b"]`` of a repeated flag -> a list; anything else goes on to pydantic."""
    parts = [value] if isinstance(value, str) else value
    if isinstance(parts, list | tuple) and all(isinstance(part, str) for part in parts):
        return [word.strip() for part in parts for word in part.split(",") if word.strip()]
    return value


def check_origin(text: str) -> str:
    """As browsers send it: in small letters, without the port that its scheme has anyway. Raises ValueError."""
    origin = text.lower()
    match = _ORIGIN.fullmatch(origin)
    if match is None or int(match[2] or 0) > 65535:
        raise ValueError(
            "an origin looks like https://chat.example.com or http://localhost:3000, without a path; each is named"
        )
    scheme, port = match.groups()
    return origin.removesuffix(f":{port}") if port == _USUAL_PORTS.get(scheme) else origin


Origins = Annotated[
    tuple[Annotated[str, AfterValidator(check_origin)], ...], NoDecode, BeforeValidator(parse_list)
]


def check_host(text: str) -> str:
    """A name in small letters. Raises ValueError."""
    host = text.lower()
    if not _HOST.fullmatch(host):
        raise ValueError(
            "a host is a name like memory.example.com, without a scheme or a port; each is named"
        )
    return host


Hosts = Annotated[
    tuple[Annotated[str, AfterValidator(check_host)], ...], NoDecode, BeforeValidator(parse_list)
]


def default_store() -> str:
    """``$XDG_DATA_HOME/memoryllm`` (or ``~/.local/share/memoryllm``), the place for a user's lasting data."""
    base = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return f"disk://{Path(base) / 'memoryllm'}"


class Settings(BaseSettings):
    """What a server is started with. Sizes in bytes accept units; durations are seconds."""

    # compose files and units set variables they have no value for; an infinite duration is null in JSON
    model_config = SettingsConfigDict(
        env_prefix="MEMORYLLM_", env_ignore_empty=True, frozen=True, extra="forbid", allow_inf_nan=False
    )

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on (0: any free one)")
    store: str = Field(
        default_factory=default_store,
        description="where memories are durable: disk:///dir or redis://host:port/db",
    )
    model: str = Field("pocket", description="pocket, a directory, or a hub id")
    served_model_name: Annotated[str, Field(max_length=256), AfterValidator(_printable)] | None = Field(
        None, description="what clients call the model (default: its hub id, or its directory's name)"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the model runs")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="weights and pools; auto: bfloat16 on a GPU, float32 on a CPU"
    )
    pool_dtype: Literal["auto", "int8"] = Field(
        "auto", description="how pools are kept in device memory; auto: in the dtype of the weights"
    )
    rotation: Literal["copy", "read"] = Field(
        "copy",
        description="keys are rotated once into a copy, or each time they are read (GPU; int8: always)",
    )
    cuda_graphs: bool = Field(
        True, description="decode steps and short prompts on a GPU are captured and replayed"
    )
    threads: int = Field(
        0, ge=0, description="CPU threads of the worker (0: all cores, one for small models)"
    )

    resident_bytes: Bytes = Field(
        0, description="device memory for pools (0: on a GPU what is left, else a quarter of the free memory)"
    )
    warm_bytes: Bytes = Field(512 * 2**20, description="host memory for pools that were evicted")
    keep_text: bool = Field(
        True, description="keep the texts of updates in the store, of a tenant's newest 2,000 contexts"
    )
    text_key_file: Path | None = Field(
        None, description="file with 32 bytes (64 hex digits) that encrypt kept texts at rest"
    )

    step_tokens: PositiveInt = Field(512, description="token budget of one step")
    max_running: PositiveInt = Field(
        64, description="requests that run at once: generations, scores, updates"
    )
    update_share: float = Field(
        0.25, gt=0, le=1, description="share of the time that updates may take while generations run (1: any)"
    )
    worker_nice: int = Field(
        10,
        ge=0,
        le=19,
        description="how far a worker on the CPU steps back behind the API (nice; 0: not at all)",
    )
    max_sequence: PositiveInt = Field(4096, description="prompt and completion together, in tokens")
    context_tokens: int = Field(
        0, ge=0, description="prompt and completion tokens held at once (0: an eighth of the free memory)"
    )
    queue_requests: PositiveInt = Field(1024, description="requests waiting or running, of all tenants")
    queue_requests_tenant: PositiveInt = Field(128, description="the same, of one tenant")
    queue_tokens: PositiveInt = Field(4_000_000, description="tokens waiting, of all tenants")
    queue_tokens_tenant: PositiveInt = Field(1_000_000, description="the same, of one tenant")
    queue_bytes: Bytes = Field(256 * 2**20, description="bodies of requests under way, of all tenants")
    queue_bytes_tenant: Bytes = Field(64 * 2**20, description="the same, of one tenant")

    keys_file: Path | None = Field(
        None, description="file of API keys, made with memoryllm keys; without it nobody is asked for one"
    )
    insecure: bool = Field(
        False, description="listen beyond the loopback without keys: somebody else lets in whoever may come"
    )
    allow_host: Hosts = Field(
        (),
        description="name by which a server without keys may be called, beside localhost (may be repeated, or with "
        "commas); beyond the loopback any may be, unless some are named here",
    )
    allow_origin: Origins = Field(
        (),
        description="origin whose pages in a browser may call the server (may be repeated, or with commas)",
    )
    open_metrics: bool = Field(False, description="/metrics needs no key")
    # a store remembers no more of a tenant than this (``app.store.url.open_store``), and counts by what it remembers
    tenant_updates_per_day: int = Field(
        0, ge=0, le=2000, description="contexts that a tenant may take in within 24 hours (0: any number)"
    )
    tenant_bytes: Bytes = Field(0, description="bytes that a tenant may have in the store (0: any)")
    tenant_concurrent: int = Field(0, ge=0, description="requests of a tenant at once (0: any number)")

    stream_backlog: PositiveInt = Field(
        2048, description="tokens kept for a reader of a stream who is behind; one further behind is cut off"
    )
    stream_stall_timeout: PositiveFloat = Field(
        30.0, description="a reader of a stream who takes nothing for this long is cut off"
    )

    max_body_bytes: Bytes = Field(8 * 2**20, description="largest request body")
    body_timeout: PositiveFloat = Field(
        30.0, description="a body of which nothing comes for this long is given up"
    )
    spool_dir: Path | None = Field(
        None, description="where exports and imports are kept on their way (default: the temporary directory)"
    )
    max_transfers: PositiveInt = Field(8, description="exports and imports at once, each a file in spool_dir")
    max_update_tokens: PositiveInt = Field(131_072, description="largest update, in tokens")
    request_timeout: PositiveFloat = Field(600.0, description="a generation's deadline")
    drain_timeout: PositiveFloat = Field(30.0, description="time given to running requests at shutdown")
    start_timeout: PositiveFloat = Field(
        600.0, description="time given to the worker to load the model, a download apart"
    )
    heartbeat_timeout: PositiveFloat = Field(
        60.0, description="a worker silent for this long is taken for hung and replaced"
    )
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_json: bool = Field(False, description="one JSON object a line instead of text for people")
