"""docker-compose.yml and what it mounts, against itself, the Dockerfile and the settings."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import yaml
from pydantic import ValidationError

from app.api.server import _LAST_SECONDS
from app.messages import WORKER_LAST_SECONDS
from app.settings import Settings
from tests.deploy.compose import Compose, interpolate, read_compose, read_raw
from tests.deploy.dockerfile import ROOT, load, seconds

COMPOSE = read_compose()
CUDA = read_compose("deploy/cuda.yml")
SERVER = COMPOSE.services["server"]
_, STAGES = load()
IMAGE = {stage.name: stage for stage in STAGES}


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("services", "server", "prots"), []),
        (("services", "server", "ports"), ["0.0.0.0:8000:8000"]),
        (("services", "server", "ports"), ["8000:8000"]),
        (("services", "redis", "read_only"), "yes"),
        (("services", "redis", "healthcheck", "interval"), "5 s"),
        (("services", "server", "environment", "MEMORYLLM_LOG_JSON"), True),
        (("networks", "store", "internal"), "true"),
        (("version",), "3"),
    ],
    ids=lambda value: ".".join(value) if isinstance(value, tuple) else "",
)
def test_the_schema_is_strict(where: tuple[str, ...], value: object) -> None:
    raw = copy.deepcopy(read_raw("docker-compose.yml"))
    place = raw
    for key in where[:-1]:
        place = place[key]
    place[where[-1]] = value
    with pytest.raises(ValidationError):
        Compose.model_validate(raw)


def test_variables_are_replaced_as_compose_does() -> None:
    assert interpolate("a${X:-1}b${Y:-2}", {"Y": "3"}) == "a1b3"
    assert interpolate("${X:-}", {"X": ""}) == ""
    with pytest.raises(KeyError):
        interpolate("${X}", {})


def test_services_are_those_promised() -> None:
    assert set(COMPOSE.services) == {"server", "redis", "prometheus", "grafana", "loadtest"}
    profiles = {name: service.profiles for name, service in COMPOSE.services.items() if service.profiles}
    assert profiles == {"loadtest": ["loadtest"]}


@pytest.mark.parametrize("name", COMPOSE.services)
def test_what_a_service_names_exists(name: str) -> None:
    service = COMPOSE.services[name]
    assert set(service.networks) <= set(COMPOSE.networks)
    for source in service.mounts().values():
        if source.startswith("./"):
            assert (ROOT / source).exists(), source
            assert f"{source}:" in str(service.volumes)
        else:
            assert source in COMPOSE.volumes
    for other in service.depends_on:
        needed = COMPOSE.services[other]
        required = isinstance(service.depends_on, list) or service.depends_on[other].required
        assert not required or set(needed.profiles) <= set(service.profiles)
        assert set(needed.networks) & set(service.networks)
        if isinstance(service.depends_on, dict) and service.depends_on[other].condition == "service_healthy":
            assert needed.healthcheck or (needed.build and IMAGE[needed.build.target].all("HEALTHCHECK"))
    if service.build:
        stage = IMAGE[service.build.target]
        known = {key for s in STAGES for key in s.arguments}
        assert set(service.build.args) <= known
        assert stage.last("USER").value != "root"
    else:
        assert service.image
        tag = service.image.partition(":")[2]
        assert tag[:1].isdigit() or tag[:2].strip("v").isdigit(), "an image is named with its version"


def test_every_volume_and_network_is_used() -> None:
    services = COMPOSE.services.values()
    assert {source for s in services for source in s.mounts().values() if source[0] != "."} == set(
        COMPOSE.volumes
    )
    assert {network for s in services for network in s.networks} == set(COMPOSE.networks)


@pytest.mark.parametrize("name", COMPOSE.services)
def test_a_service_has_no_more_power_than_it_needs(name: str) -> None:
    service = COMPOSE.services[name]
    assert service.cap_drop == ["ALL"]
    assert "no-new-privileges:true" in service.security_opt
    # files of the repository are not theirs to change
    assert all(volume.endswith(":ro") for volume in service.volumes if volume.startswith("./"))
    assert not [key for key in service.environment if "PASSWORD" in key or "SECRET" in key]


def test_redis_is_reached_by_the_server_alone() -> None:
    redis = COMPOSE.services["redis"]
    assert redis.ports == []
    (network,) = redis.networks
    settings = COMPOSE.networks[network]
    assert settings is not None
    assert settings.internal
    assert {name for name, s in COMPOSE.services.items() if network in s.networks} == {"server", "redis"}


def test_published_ports_are_the_containers_own() -> None:
    published = {name: [p.split(":")[2] for p in s.ports] for name, s in COMPOSE.services.items() if s.ports}
    assert published == {
        "server": [IMAGE["server"].last("EXPOSE").value],
        "prometheus": ["9090"],
        "grafana": ["3000"],
    }
    other = read_compose(PORT="9000").services["server"]
    assert other.ports == ["127.0.0.1:9000:8000"]


def settings_of(compose: Compose, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The settings of a server in the image started by compose; every MEMORYLLM_ name must be one."""
    for name in [name for name in os.environ if name.startswith("MEMORYLLM_")]:
        monkeypatch.delenv(name)
    environment = IMAGE["server"].environment | compose.services["server"].environment
    for name, value in environment.items():
        if name.startswith("MEMORYLLM_"):
            assert name.removeprefix("MEMORYLLM_").lower() in Settings.model_fields, name
            assert value is not None
            monkeypatch.setenv(name, value)
    return Settings()


def test_the_environment_is_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(COMPOSE, monkeypatch)
    assert settings.host == "0.0.0.0"
    assert str(settings.port) == IMAGE["server"].last("EXPOSE").value
    assert settings.log_json
    assert settings.store == "redis://redis:6379/0"
    # nobody beyond the loopback reaches it, so that it may be without keys until there are some
    assert settings.keys_file is None
    assert settings.insecure
    assert all(port.startswith("127.0.0.1:") for port in SERVER.ports)
    assert settings.open_metrics
    assert settings.warm_bytes == Settings.model_fields["warm_bytes"].default
    changed = read_compose(MEMORYLLM_STORE="disk:///data/other", MEMORYLLM_WARM_BYTES="2GiB")
    assert settings_of(changed, monkeypatch).warm_bytes == 2 << 30
    assert settings_of(changed, monkeypatch).store == "disk:///data/other"


def test_the_server_may_write_where_it_must_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    volumes = IMAGE["server"].last("VOLUME").words
    assert SERVER.read_only
    assert set(SERVER.mounts()) == set(volumes)
    assert {"/tmp", IMAGE["server"].last("WORKDIR").value} <= set(SERVER.tmpfs)
    store = settings_of(COMPOSE, monkeypatch).store
    if store.startswith("disk://"):
        assert any(store.removeprefix("disk://").startswith(f"{volume}/") for volume in volumes)


def test_a_stop_waits_for_the_drain() -> None:
    assert SERVER.init
    drained = Settings.model_fields["drain_timeout"].default + WORKER_LAST_SECONDS + _LAST_SECONDS
    # then the last events are sent, for as long at most
    assert seconds(SERVER.stop_grace_period) > drained + _LAST_SECONDS


def test_the_cuda_file_changes_the_server_only(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = read_raw("deploy/cuda.yml")
    assert set(raw["services"]) == {"server"}
    server = CUDA.services["server"]
    assert server.build is not None
    assert server.build.args == {"VARIANT": "cuda"}
    assert server.image != SERVER.image
    merged = copy.deepcopy(COMPOSE)
    merged.services["server"].environment |= server.environment
    assert settings_of(merged, monkeypatch).device == "cuda"
    assert server.deploy is not None
    assert server.deploy.resources.reservations.devices[0].capabilities == ["gpu"]


def test_the_load_generator_is_bounded_and_asks_the_server() -> None:
    environment = COMPOSE.services["loadtest"].environment
    port = IMAGE["server"].last("EXPOSE").value
    assert environment["LOCUST_HOST"] == f"http://server:{port}"
    assert environment["LOCUST_HEADLESS"] == "true"
    assert environment["LOCUST_RUN_TIME"] == "60s"
    assert set(COMPOSE.services["loadtest"].networks) & set(SERVER.networks)


def test_locust_knows_the_file_and_the_variables() -> None:
    environment = {k: v for k, v in COMPOSE.services["loadtest"].environment.items() if v is not None}
    base = [sys.executable, "-m", "locust", "--locustfile", "loadtest/locustfile.py"]
    keep = {k: v for k, v in os.environ.items() if not k.startswith("LOCUST_")}

    def said(*arguments: str, **extra: str) -> str:
        done = subprocess.run(
            [*base, *arguments], cwd=ROOT, env=keep | extra, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    assert "Rememberer" in said("--list", **environment)
    known = said("--help")
    for name in environment:
        assert f"--{name.removeprefix('LOCUST_').lower().replace('_', '-')}" in known, name


def test_redis_keeps_what_it_is_given() -> None:
    redis = COMPOSE.services["redis"]
    assert redis.command is not None
    program, file, *rest = redis.command
    options = dict(zip(rest[::2], rest[1::2], strict=True))
    assert program == "redis-server"
    assert redis.mounts()[file] == "./deploy/redis.conf"
    assert redis.mounts()[options["--dir"]] == "redis"
    # a limit and no eviction; the file itself is tried with a real server in test_redis.py
    assert options["--maxmemory"] == "0"
    assert redis.user not in {None, "root", "0"}


def repeated(node: yaml.Node) -> list[str]:
    """The keys that a mapping below has twice."""
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value]
        twice = [key for key in keys if keys.count(key) > 1]
        return twice + [key for _, value in node.value for key in repeated(value)]
    return (
        [key for value in node.value for key in repeated(value)]
        if isinstance(node, yaml.SequenceNode)
        else []
    )


def test_no_key_is_there_twice() -> None:
    """The YAML reader takes the last of two equal keys in silence; compose refuses the file."""
    assert repeated(yaml.compose("a: [{b: 1, b: 2}]")) == ["b", "b"]
    for path in [ROOT / "docker-compose.yml", *(ROOT / "deploy").rglob("*.yml")]:
        assert not repeated(yaml.compose(path.read_text())), path
