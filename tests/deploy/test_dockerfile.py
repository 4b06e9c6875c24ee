"""The Dockerfile against the repository: what it copies, runs and sets. No container engine is needed."""

from __future__ import annotations

import ast
import http.server
import os
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from app.settings import Settings
from tests.deploy.dockerfile import ROOT, Ignore, Stage, chain, load, needed, read_dockerfile, seconds

ARGUMENTS, STAGES = load()
BY_NAME = {stage.name: stage for stage in STAGES}
SERVER = BY_NAME["server"]
IGNORED = Ignore((ROOT / ".dockerignore").read_text())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def copied(stage: Stage) -> list[str]:
    """The repository's paths that a stage's own COPY instructions take."""
    return [
        path.removesuffix("/")
        for copy in stage.all("COPY")
        if copy.flag("from") is None
        for path in copy.value.split()[:-1]
    ]


def script(stage: Stage, word: str) -> str:
    """The one RUN of a stage that has this word."""
    (found,) = [run.value for run in stage.all("RUN") if word in run.value]
    return found


def test_the_parser_reads_what_docker_reads() -> None:
    arguments, stages = read_dockerfile(
        "# one\nARG BASE=image:1\nFROM ${BASE} AS a\nENV X=1 \\\n    # between\n    Y=2\nFROM a AS b\n"
        'COPY --from=a --chown=1:1 x y ./\nCMD ["z"]\n'
    )
    assert arguments == {"BASE": "image:1"}
    assert [(stage.name, stage.base) for stage in stages] == [("a", "image:1"), ("b", "a")]
    assert stages[0].environment == {"X": "1", "Y": "2"}
    assert stages[1].last("COPY").flags == [("from", "a"), ("chown", "1:1")]
    assert stages[1].last("CMD").words == ["z"]
    ignored = Ignore("*\n!app\n!deploy/one.py\n**/*.pyc\n")
    assert [ignored(p) for p in (".env", "app/x.py", "app/x/y.pyc", "deploy/one.py", "deploy/two.py")] == [
        True, False, True, False, True,
    ]  # fmt: skip


@pytest.mark.parametrize("stage", STAGES, ids=[stage.name for stage in STAGES])
def test_what_is_copied_exists_and_is_sent_to_the_builder(stage: Stage) -> None:
    for path in copied(stage):
        assert (ROOT / path).exists(), path
        assert not IGNORED(path), f"{path} is left out by .dockerignore"


@pytest.mark.parametrize("stage", STAGES, ids=[stage.name for stage in STAGES])
def test_stages_are_made_from_earlier_ones(stage: Stage) -> None:
    earlier = {s.name for s in STAGES[: STAGES.index(stage)]}
    assert stage.base in earlier | {ARGUMENTS["PYTHON_IMAGE"]}
    for instruction in stage.instructions:
        for source in [instruction.flag("from"), *(mount.get("from") for mount in instruction.mounts)]:
            assert source is None or source in earlier, source


def test_the_server_is_what_a_plain_build_makes() -> None:
    assert STAGES[-1] is SERVER
    assert {stage.name for stage in needed(STAGES, "server")} == {"base", "dependencies", "package", "server"}


@pytest.mark.parametrize(
    "path", [".git/config", ".env", "keys.json", "tests/harness.py", "data/x", ".venv/bin/python", "app.key"]
)
def test_nothing_else_is_sent_to_the_builder(path: str) -> None:
    assert IGNORED(path)


def test_the_image_has_all_of_the_package() -> None:
    sources = copied(BY_NAME["package"])
    packages = [
        pattern.removesuffix("*") for pattern in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
    ]
    assert set(packages) <= set(sources)
    assert {PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]} <= set(sources)
    files = [path for package in packages for path in (ROOT / package).rglob("*") if path.is_file()]
    left_out = {str(path.relative_to(ROOT)) for path in files if IGNORED(str(path.relative_to(ROOT)))}
    assert all("__pycache__" in path for path in left_out), left_out
    assert any(path.suffix == ".safetensors" for path in files)


def imported(path: Path) -> set[str]:
    """The top-level names that a file imports absolutely."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def test_nothing_in_the_image_imports_what_is_not() -> None:
    ours = {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()}
    absent = ours - set(copied(BY_NAME["package"]))
    assert "tests" in absent
    for package in ("app", "kernels"):
        for path in (ROOT / package).rglob("*.py"):
            assert not imported(path) & absent, path
    assert imported(ROOT / "deploy/healthcheck.py") <= sys.stdlib_module_names
    known = sys.stdlib_module_names | {"locust", *copied(BY_NAME["loadtest"])}
    assert imported(ROOT / "loadtest/locustfile.py") <= known


def test_a_change_of_the_code_leaves_the_dependencies_cached() -> None:
    assert {path for stage in chain(STAGES, "dependencies") for path in copied(stage)} == {
        "constraints.txt",
        "pyproject.toml",
    }
    order = [copy.flag("from") for copy in SERVER.all("COPY")]
    assert order.index("dependencies") < order.index("package")
    (install,) = BY_NAME["package"].all("RUN")
    assert "--no-deps" in install.value
    _, _, prefix = install.value.partition("--prefix ")
    (copy,) = [c.value for c in SERVER.all("COPY") if c.flag("from") == "package"]
    # scripts start the interpreter that installed them, which lies at the same place in both stages
    assert copy.split() == [prefix.split()[0], "/opt/memoryllm"]
    assert "/opt/memoryllm/bin:" in BY_NAME["base"].environment["PATH"]


RUNS = [(stage.name, run.value) for stage in STAGES for run in stage.all("RUN")]


@pytest.mark.parametrize(("stage", "value"), RUNS, ids=[f"{s}-{i}" for i, (s, _) in enumerate(RUNS)])
def test_every_step_is_sound_shell(stage: str, value: str) -> None:
    subprocess.run(["sh", "-n", "-c", value], check=True)


def run_step(value: str, tmp_path: Path, **environment: str) -> tuple[int, list[str]]:
    """Runs a step in an empty directory with commands that only say how they were called."""
    (tmp_path / "bin").mkdir()
    for name in ("pip", "apt-get", "rm"):
        command = tmp_path / "bin" / name
        command.write_text(f'#!/bin/sh\necho {name} "$@" >> "{tmp_path}/calls"\n')
        command.chmod(0o755)
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(["sh", "-c", value], cwd=tmp_path, env={"PATH": path, **environment}, timeout=30)
    calls = tmp_path / "calls"
    return done.returncode, calls.read_text().splitlines() if calls.exists() else []


CPU_INDEX = "https://download.pytorch.org/whl/cpu"


@pytest.mark.parametrize(
    ("arguments", "calls"),
    [
        ({}, [f"pip install --index-url {CPU_INDEX} -c constraints.txt torch"]),
        ({"CPU_INDEX": ""}, ["pip install -c constraints.txt torch"]),
        ({"VARIANT": "cuda"}, ["pip install -c constraints.txt torch"]),
        (
            {"VARIANT": "cuda", "CUDA_INDEX": "https://i/cu"},
            ["pip install --index-url https://i/cu -c constraints.txt torch"],
        ),
        ({"VARIANT": "rocm"}, None),
    ],
    ids=["cpu", "cpu-own-index", "cuda", "cuda-index", "unknown"],
)
def test_the_variant_chooses_torch(
    arguments: dict[str, str], calls: list[str] | None, tmp_path: Path
) -> None:
    stage = BY_NAME["dependencies"]
    code, said = run_step(script(stage, "torch"), tmp_path, **stage.arguments | arguments)
    assert (code, said) == ((0, calls) if calls is not None else (1, []))


@pytest.mark.parametrize(("variant", "compiler"), [("cpu", False), ("cuda", True)])
def test_only_the_cuda_variant_has_a_compiler(variant: str, compiler: bool, tmp_path: Path) -> None:
    code, said = run_step(script(SERVER, "apt-get"), tmp_path, VARIANT=variant)
    assert code == 0
    assert any("gcc" in call for call in said) is compiler


@pytest.mark.parametrize(
    ("stage", "wanted"),
    [
        ("dependencies", PROJECT["project"]["dependencies"]),
        ("loadtest", PROJECT["project"]["optional-dependencies"]["load"]),
    ],
)
def test_requirements_are_the_projects(stage: str, wanted: list[str], tmp_path: Path) -> None:
    code, said = run_step(script(BY_NAME[stage], "tomllib"), tmp_path)
    assert code == 0
    assert (tmp_path / "requirements.txt").read_text().splitlines() == wanted
    assert len(said) == 1
    assert said[0].endswith("-r requirements.txt")


def test_torch_is_pinned_by_every_install() -> None:
    pins = (ROOT / "constraints.txt").read_text()
    assert "torch==" in pins
    for run in BY_NAME["dependencies"].all("RUN"):
        assert "-c constraints.txt" in run.value


def test_the_user_is_not_root_and_owns_the_volumes() -> None:
    user = SERVER.last("USER").value
    assert user.split(":")[0].isdigit()
    assert "0" not in user.split(":")
    owner = script(SERVER, "useradd")
    assert f"--uid {user.split(':')[0]}" in owner
    _, _, made = owner.partition(f"install -d -o {user.split(':')[0]} -g {user.split(':')[1]} -m 700 ")
    volumes = SERVER.last("VOLUME").words
    assert "/data" in volumes
    assert set(made.split()) == set(volumes)
    # what is declared a volume before it is filled stays empty
    names = [i.name for i in SERVER.instructions]
    assert names.index("VOLUME") > max(i for i, name in enumerate(names) if name in {"RUN", "COPY"})


def test_the_entry_point_is_a_command_that_gets_the_signals() -> None:
    assert SERVER.last("ENTRYPOINT").words == list(PROJECT["project"]["scripts"])
    assert SERVER.last("CMD").words == ["serve"]
    assert SERVER.last("STOPSIGNAL").value == "SIGTERM"
    assert BY_NAME["loadtest"].last("ENTRYPOINT").words[2] in {"loadtest/locustfile.py"}


def test_the_environment_is_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {k: v for k, v in SERVER.environment.items() if k.startswith("MEMORYLLM_")}
    for name in list(os.environ):
        if name.startswith("MEMORYLLM_"):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        assert name.removeprefix("MEMORYLLM_").lower() in Settings.model_fields, name
        monkeypatch.setenv(name, value)
    settings = Settings()
    volumes = SERVER.last("VOLUME").words
    # below the volume: a store wants a directory of its own, and keys lie beside it
    assert any(settings.store.removeprefix("disk://").startswith(f"{volume}/") for volume in volumes)
    assert any(str(settings.spool_dir).startswith(f"{volume}/") for volume in volumes)
    assert settings.host == "0.0.0.0"
    assert SERVER.last("EXPOSE").value == str(settings.port)
    for name in ("HF_HOME", "TRITON_CACHE_DIR"):
        assert any(SERVER.environment[name].startswith(f"{volume}/") for volume in volumes)


def test_the_health_check_is_in_the_image_and_as_patient_as_the_server() -> None:
    check = SERVER.last("HEALTHCHECK")
    command = check.value.removeprefix("CMD ")
    (copy,) = [c for c in SERVER.all("COPY") if c.value.startswith("deploy/healthcheck.py ")]
    assert command == f'["python", "{copy.value.split()[-1]}"]'
    assert seconds(check.flag("start-period") or "") >= Settings.model_fields["start_timeout"].default
    assert seconds(check.flag("timeout") or "") > 4


@contextmanager
def answering(status: int) -> Iterator[tuple[int, list[str]]]:
    """A server on the loopback that always answers this; its port, and the paths it was asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server.server_port, asked
        server.shutdown()
        thread.join(10)


def check_health(port: int) -> int:
    # a proxy is no way to the server in the same container
    environment = {"MEMORYLLM_PORT": str(port), "http_proxy": "http://127.0.0.1:9"}
    command = [sys.executable, str(ROOT / "deploy/healthcheck.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
    assert done.stdout
    assert not done.stderr
    return done.returncode


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1), (404, 1)])
def test_the_health_check_believes_ready_alone(status: int, code: int) -> None:
    with answering(status) as (port, asked):
        assert check_health(port) == code
    assert asked == ["/ready"]


def test_the_health_check_fails_where_nobody_listens() -> None:
    with answering(200) as (port, _):
        pass
    assert check_health(port) == 1
