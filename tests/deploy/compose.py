"""The part of the compose specification that this repository uses, strictly: an unknown key is an error."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from tests.deploy.dockerfile import ROOT, seconds


def _duration(value: str) -> str:
    seconds(value)
    return value


Duration = Annotated[str, AfterValidator(_duration)]
Port = Annotated[str, StringConstraints(pattern=r"^127\.0\.0\.1:\d{1,5}:\d{1,5}$")]
Mount = Annotated[str, StringConstraints(pattern=r"^(\./[\w./-]+|[a-z]+):/[\w./-]+(:ro)?$")]
Image = Annotated[str, StringConstraints(pattern=r"^[\w./-]+(:[\w.-]+)?$")]
Words = Annotated[list[str], Field(min_length=1)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Build(Strict):
    context: Literal["."] = "."
    target: str = "server"
    args: dict[str, str] = {}


class HealthCheck(Strict):
    test: Words
    interval: Duration
    timeout: Duration
    retries: int
    start_period: Duration


class Dependency(Strict):
    condition: Literal["service_started", "service_healthy", "service_completed_successfully"]
    required: bool = True


class Logging(Strict):
    driver: str
    options: dict[str, str]


class Device(Strict):
    driver: str
    count: int
    capabilities: Words


class Reservations(Strict):
    devices: list[Device]


class Resources(Strict):
    reservations: Reservations


class Deploy(Strict):
    resources: Resources


class Service(Strict):
    build: Build | None = None
    image: Image | None = None
    user: str | None = None
    init: bool = False
    entrypoint: Words | None = None
    command: Words | None = None
    profiles: list[str] = []
    ports: list[Port] = []
    networks: list[str] = ["default"]
    volumes: list[Mount] = []
    environment: dict[str, str | None] = {}
    depends_on: dict[str, Dependency] | list[str] = {}
    healthcheck: HealthCheck | None = None
    restart: Literal["no", "always", "on-failure", "unless-stopped"] = "no"
    stop_grace_period: Duration = "10s"
    read_only: bool = False
    tmpfs: list[str] = []
    cap_drop: list[str] = []
    security_opt: list[str] = []
    logging: Logging | None = None
    deploy: Deploy | None = None

    def mounts(self) -> dict[str, str]:
        """What is mounted, by its place in the container."""
        return {mount.split(":")[1]: mount.split(":")[0] for mount in self.volumes}


class Network(Strict):
    internal: bool = False


class Compose(Strict):
    name: str = ""
    services: dict[str, Service]
    networks: dict[str, Network | None] = {}
    volumes: dict[str, None] = {}


_VARIABLE = re.compile(r"\$\{(?P<name>\w+)(?P<has>:-)?(?P<default>[^}]*)\}")


def interpolate(value: Any, variables: dict[str, str]) -> Any:
    """``${NAME}`` and ``${NAME:-default}`` in every text below. Raises KeyError for a name without either."""
    match value:
        case str():
            return _VARIABLE.sub(
                lambda m: variables.get(m["name"]) or (m["default"] if m["has"] else variables[m["name"]]),
                value,
            )
        case dict():
            return {key: interpolate(inner, variables) for key, inner in value.items()}
        case list():
            return [interpolate(inner, variables) for inner in value]
    return value


def read_raw(path: str, **variables: str) -> dict[str, Any]:
    raw: dict[str, Any] = interpolate(yaml.safe_load((ROOT / path).read_text()), variables)
    # parts that services take in by <<; compose ignores their names
    return {key: value for key, value in raw.items() if not key.startswith("x-")}


def read_compose(path: str = "docker-compose.yml", **variables: str) -> Compose:
    """Raises pydantic's ValidationError for anything that compose would not take, or that is not known here."""
    return Compose.model_validate(read_raw(path, **variables))
