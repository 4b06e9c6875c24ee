"""Runs the image's steps in order in a bare directory, starts the server that comes of them, asks it, stops it.

    python -m tests.deploy.rehearse /tmp/image [--arg VARIANT=cpu] [--arg CPU_INDEX=]

No container engine and no root are needed: each absolute path of the image becomes one below the directory. What
stands for the system is left out and said so: users, apt-get. It installs torch and all dependencies anew, which
takes minutes, so no test runs it. Exit code 0 if everything worked.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from tests.deploy.dockerfile import ROOT, Ignore, Instruction, Stage, load, needed

SYSTEM = ("apt-get", "useradd")
PATHS = re.compile(r"(?<![\w.}-])/(?:opt|src|install|data|cache|home|root)\b")
START_SECONDS = 120.0


class Rehearsal:
    """All stages share one directory: a virtual environment cannot be copied to another place."""

    def __init__(self, directory: Path, arguments: dict[str, str]) -> None:
        self.directory = directory
        self.arguments = arguments
        self.environment: dict[str, str] = {}
        self.here = directory
        self._ignored = Ignore((ROOT / ".dockerignore").read_text())

    def moved(self, text: str) -> str:
        """The text with the image's absolute paths below the directory."""
        return PATHS.sub(lambda match: f"{self.directory}{match[0]}", text)

    def stage(self, stage: Stage, known: set[str]) -> None:
        if stage.base not in known:
            self.environment = {
                k: v for k, v in os.environ.items() if not k.startswith(("MEMORYLLM_", "VIRTUAL_"))
            }
            self.here = self.directory
        for name, default in stage.arguments.items():
            self.environment[name] = self.arguments.get(name, default)
        for instruction in stage.instructions:
            print(f"{stage.name}: {instruction.name} {instruction.value[:100]}", flush=True)
            self.step(instruction)

    def step(self, instruction: Instruction) -> None:
        match instruction.name:
            case "ENV":
                for word in instruction.value.split():
                    name, _, value = word.partition("=")
                    value = self.moved(value).replace("$PATH", self.environment.get("PATH", ""))
                    self.environment[name] = value
            case "WORKDIR":
                self.here = Path(self.moved(instruction.value))
                self.here.mkdir(parents=True, exist_ok=True)
            case "COPY":
                *sources, target = instruction.value.split()
                if instruction.flag("from") is not None:
                    if sources != [target]:
                        shutil.copytree(self.moved(sources[0]), self.moved(target), dirs_exist_ok=True)
                    return
                for source in sources:
                    self.copy(source, self.here / self.moved(target), into=target.endswith("/"))
            case "VOLUME":
                for volume in instruction.words:
                    Path(self.moved(volume)).mkdir(parents=True, exist_ok=True)
            case "RUN" if any(word in instruction.value for word in SYSTEM):
                print("  left out: it changes the system")
            case "RUN":
                subprocess.run(
                    ["sh", "-c", self.moved(instruction.value)],
                    cwd=self.here,
                    env=self.environment,
                    check=True,
                )

    def copy(self, source: str, target: Path, *, into: bool) -> None:
        """A file, or all of a directory that .dockerignore lets through."""
        origin = ROOT / source
        if origin.is_file():
            target = target / origin.name if into else target
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(origin, target)
            return
        for path in origin.rglob("*"):
            if path.is_file() and not self._ignored(str(path.relative_to(ROOT))):
                place = target / path.relative_to(origin)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, place)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def ask(port: int, path: str, body: dict[str, object]) -> dict[str, object]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        answer: dict[str, object] = json.load(response)
    return answer


def serve(rehearsal: Rehearsal, server: Stage) -> None:
    """Starts entry point and command, waits for the health check, updates, asks, and ends it by SIGTERM."""
    port = free_port()
    environment = rehearsal.environment | {"MEMORYLLM_HOST": "127.0.0.1", "MEMORYLLM_PORT": str(port)}
    words = server.last("ENTRYPOINT").words + server.last("CMD").words
    check = [rehearsal.moved(w) for w in json.loads(server.last("HEALTHCHECK").value.removeprefix("CMD "))]
    path = environment["PATH"]
    command = [shutil.which(words[0], path=path) or words[0], *words[1:]]
    process = subprocess.Popen(command, cwd=rehearsal.here, env=environment)
    try:
        until = time.monotonic() + START_SECONDS
        probe = [shutil.which(check[0], path=path) or check[0], *check[1:]]
        while subprocess.run(probe, env=environment).returncode != 0:
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit("the server did not become healthy")
            time.sleep(1)
        text = "My dog is called Rex. My sister Mira Tolvan lives in Tarnovik."
        print(ask(port, "/update", {"tenant": "ada", "text": text}))
        question = [{"role": "user", "content": "What is my dog called?"}]
        print(ask(port, "/generate", {"tenant": "ada", "messages": question, "temperature": 0.0}))
        process.terminate()
        code = process.wait(60)
        print(f"SIGTERM: exit code {code}")
        if code:
            raise SystemExit(code)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait(10)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, help="a new directory")
    parser.add_argument("--arg", action="append", default=[], help="a build argument, NAME=VALUE")
    given = parser.parse_args()
    given.directory.mkdir(parents=True)
    rehearsal = Rehearsal(
        given.directory.resolve(), dict(argument.partition("=")[::2] for argument in given.arg)
    )
    _, stages = load()
    known: set[str] = set()
    for stage in needed(stages, "server"):
        rehearsal.stage(stage, known)
        known.add(stage.name)
    serve(rehearsal, stages[-1])
    return 0


if __name__ == "__main__":
    sys.exit(main())
