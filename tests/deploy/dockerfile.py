"""Reads a Dockerfile and a .dockerignore, as far as this repository's use them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Instruction:
    """``value`` is the text after name and flags; ``flags`` keeps repeated ones in order."""

    name: str
    flags: list[tuple[str, str]]
    value: str

    def flag(self, name: str) -> str | None:
        return next((value for key, value in self.flags if key == name), None)

    @property
    def mounts(self) -> list[dict[str, str]]:
        return [
            dict(part.partition("=")[::2] for part in value.split(","))
            for key, value in self.flags
            if key == "mount"
        ]

    @property
    def words(self) -> list[str]:
        """The exec form's words. Raises ValueError for a shell form."""
        words: list[str] = json.loads(self.value)
        return words


@dataclass(frozen=True)
class Stage:
    name: str
    base: str
    instructions: list[Instruction] = field(default_factory=list)

    def all(self, name: str) -> list[Instruction]:
        return [i for i in self.instructions if i.name == name]

    def last(self, name: str) -> Instruction:
        return self.all(name)[-1]

    @property
    def arguments(self) -> dict[str, str]:
        """What ARG sets when the builder is told nothing."""
        return {key: value for key, _, value in (i.value.partition("=") for i in self.all("ARG"))}

    @property
    def environment(self) -> dict[str, str]:
        pairs: dict[str, str] = {}
        for instruction in self.all("ENV"):
            pairs |= dict(word.partition("=")[::2] for word in instruction.value.split())
        return pairs


def read_dockerfile(text: str) -> tuple[dict[str, str], list[Stage]]:
    """The arguments before the first FROM, and the stages in order."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    arguments: dict[str, str] = {}
    stages: list[Stage] = []
    for line in filter(None, (line.strip() for line in joined.splitlines())):
        name, _, rest = line.partition(" ")
        flags, rest = [], rest.strip()
        while found := re.match(r"--([a-z-]+)=(\S+)\s+", rest):
            flags.append((found[1], found[2]))
            rest = rest[found.end() :]
        if name == "FROM":
            base, _, stage = rest.partition(" AS ")
            base = re.sub(r"\$\{(\w+)\}", lambda m: arguments[m[1]], base)
            stages.append(Stage(stage, base))
        elif not stages:
            assert name == "ARG", line
            key, _, value = rest.partition("=")
            arguments[key] = value
        else:
            stages[-1].instructions.append(Instruction(name, flags, rest))
    return arguments, stages


def chain(stages: list[Stage], name: str) -> list[Stage]:
    """The stage and those it is made from, first the one that comes from outside."""
    by_name = {stage.name: stage for stage in stages}
    found = [by_name[name]]
    while found[0].base in by_name:
        found.insert(0, by_name[found[0].base])
    return found


def needed(stages: list[Stage], name: str) -> list[Stage]:
    """The stages that building this one runs, in order."""
    wanted = {name}
    for stage in reversed(stages):
        if stage.name in wanted:
            wanted.add(stage.base)
            for instruction in stage.instructions:
                wanted |= {m["from"] for m in instruction.mounts if "from" in m}
                wanted |= {value for key, value in instruction.flags if key == "from"}
    return [stage for stage in stages if stage.name in wanted]


def _pattern(pattern: str) -> re.Pattern[str]:
    parts = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    expression = "".join(
        parts.get(piece, re.escape(piece)) for piece in re.findall(r"\*\*/|\*\*|\*|\?|[^*?]+", pattern)
    )
    return re.compile(expression)


class Ignore:
    """A .dockerignore: the last matching line decides; a directory's line holds for all below it."""

    def __init__(self, text: str) -> None:
        lines = (line.strip() for line in text.splitlines())
        self._rules = [
            (not line.startswith("!"), _pattern(line.lstrip("!").strip("/")))
            for line in lines
            if line and not line.startswith("#")
        ]

    def __call__(self, path: str) -> bool:
        """Whether the builder is not sent this path, which is relative to the repository."""
        parents = ["/".join(path.split("/")[: i + 1]) for i in range(path.count("/") + 1)]
        left_out = False
        for exclude, pattern in self._rules:
            if any(pattern.fullmatch(parent) for parent in parents):
                left_out = exclude
        return left_out


def load() -> tuple[dict[str, str], list[Stage]]:
    return read_dockerfile((ROOT / "Dockerfile").read_text())


def seconds(duration: str) -> float:
    """``40s``, ``1m30s`` -> seconds, as Docker reads them. Raises ValueError."""
    found = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", duration)
    if not duration or found is None:
        raise ValueError(f"not a duration: {duration}")
    hours, minutes, rest = (int(part or 0) for part in found.groups())
    return hours * 3600 + minutes * 60 + rest
