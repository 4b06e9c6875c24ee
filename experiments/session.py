"""What all experiments share: their options, the progress bar, the journal, and the files of their results."""

from __future__ import annotations

import argparse
import asyncio
import datetime
import hashlib
import json
import secrets
import shlex
import sys
from collections.abc import Awaitable, Callable, Sequence, Set
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TimeElapsedColumn, TimeRemainingColumn

from experiments import plot
from experiments.client import STOP, Client
from experiments.journal import AnotherRun, Journal, Log, OtherSettings, claimed, head_of
from experiments.machine import machine

POCKET = "pocket"
# these say how to run, not what is measured
CONDUCT = {"url", "results", "fresh", "concurrency", "kill_at", "quiet", "name", "also", "child", "words"}
# of these the command that a result shows has nothing
UNTOLD = CONDUCT - {"concurrency", "kill_at", "also"}
FLAGS = {"fresh", "quiet", "child"}
# of a result: where, when and how fast it was measured
MEASURING = ("machine", "device", "date", "updates_a_second")


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """With the options that every experiment has."""
    made = argparse.ArgumentParser(
        prog=f"python -m experiments.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--url", default="http://127.0.0.1:8000", help="a running memoryllm serve")
    add("--seed", type=int, default=1, help="of the facts, and of what new memories forget")
    add("--concurrency", type=int, default=8, help="items at once, each in a memory of its own")
    add("--results", type=Path, default=Path("results"), help="folder of JSON, plots and journals")
    add("--name", default=name, help="of the files in it")
    add("--fresh", action="store_true", help="forget what an interrupted run has measured")
    add("--quiet", action="store_true", help="no progress bar")
    return made


def asking(made: argparse.ArgumentParser) -> None:
    """Adds the options of an experiment that puts questions."""
    add = made.add_argument
    add("--template", help='for models without a chat template, such as "Question: {question} Answer:"')
    add("--max-tokens", type=int, default=16)
    judging(made)


def judging(made: argparse.ArgumentParser) -> None:
    rule = "an answer counts if it equals the value, or if it holds it as whole words"
    made.add_argument(
        "--judge",
        choices=("exact", "holds"),
        help=f"{rule} (default: exact for the pocket model's facts, holds for other models and SQuAD)",
    )


class Session:
    """One run of an experiment against one server."""

    def __init__(self, experiment: str, arguments: argparse.Namespace, client: Client) -> None:
        self.experiment, self.arguments, self.client = experiment, arguments, client
        self.server: dict[str, Any] = {}
        self.settings: dict[str, Any] = {}
        self.log: Log

    @property
    def exact(self) -> bool:
        """By which rule answers count."""
        return bool(self.arguments.judge == "exact")

    @property
    def folder(self) -> Path:
        results: Path = self.arguments.results
        return results

    async def open(self, extendable: Set[str] = frozenset()) -> None:
        """Asks the server what it serves, and opens the log. Raises SystemExit if that is of other settings.

        The settings named in ``extendable`` may differ.
        """
        self.server = await self.client.call("GET", "/ready", once=True)
        if hasattr(self.arguments, "judge"):
            own = self.server["model"] == POCKET and getattr(self.arguments, "squad", None) is None
            self.arguments.judge = self.arguments.judge or ("exact" if own else "holds")
            self.arguments.stop = STOP if self.client.template else None
        given = {k: v for k, v in vars(self.arguments).items() if k not in CONDUCT | extendable}
        shown = {k: v.name if isinstance(v, Path) else v for k, v in given.items()}
        try:
            shown |= {f"{k}_sha256": short_hash(v) for k, v in given.items() if isinstance(v, Path)}
            served = {key: self.server[key] for key in ("model", "fingerprint", "device", "dtype")}
            self.settings = shown | served
            if self.arguments.fresh:
                await forget([self.client], self.experiment, self.path)
            self.log = Log(self.path, self.settings, secrets.token_hex(3))
        except (OSError, OtherSettings, AnotherRun) as error:
            raise SystemExit(str(error)) from None
        if self.log.lines:
            print(f"going on behind {len(self.log.lines)} lines of {self.path}", file=sys.stderr)

    @property
    def results(self) -> Path:
        return self.folder / f"{self.arguments.name}.json"

    @property
    def path(self) -> Path:
        """The log of what has been measured so far."""
        return self.folder / "journal" / f"{self.arguments.name}.jsonl"

    def tenant(self, item: object) -> str:
        """The name of a memory of this run; the same after a resume."""
        return f"{self.experiment}-{self.log.run}-{item}"

    async def play(
        self, items: Sequence[str], measure: Callable[[str], Awaitable[Any]], what: str = "items"
    ) -> dict[str, Any]:
        """Measures every item that was not yet, ``--concurrency`` at once; what was measured, by item."""
        journal = Journal(self.log)
        missing = [item for item in items if item not in journal.items]
        waiting = iter(missing)
        with self.progress() as progress:
            bar = progress.add_task(what, total=len(items), completed=len(items) - len(missing))

            async def one_after_another() -> None:
                for item in waiting:
                    journal.add(item, await measure(item))
                    progress.advance(bar)

            async with asyncio.TaskGroup() as group:
                for _ in range(min(self.arguments.concurrency, len(missing))):
                    group.create_task(one_after_another())
        return {item: journal.items[item] for item in items}

    def progress(self) -> Progress:
        """A bar on standard error, if a person looks."""
        columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
        hidden = self.arguments.quiet or not sys.stderr.isatty()
        return Progress(
            SpinnerColumn(), *columns, TimeRemainingColumn(), console=Console(stderr=True), disable=hidden
        )

    def keep(self, figures: dict[str, Any], chart: str | None) -> dict[str, Any]:
        """Writes ``NAME.json`` and ``NAME.svg``; returns what the former holds."""
        words = getattr(self.arguments, "words", sys.argv[1:])
        command = shlex.join(["python", "-m", f"experiments.{self.experiment}", *measured(words)])
        told = {
            "experiment": self.experiment,
            "command": command,
            "seed": self.arguments.seed,
            "machine": machine(self.arguments.url, *getattr(self.arguments, "also", [])),
            "device": f"{self.server['device']}, {self.server['dtype']}",
            "date": datetime.date.today().isoformat(),
            "settings": self.settings,
            **figures,
        }
        if not self.log.written:
            # this run has only looked at what an earlier one measured
            told |= self._measured_before()
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.results
        path.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", "utf-8")
        if chart is None:
            path.with_suffix(".svg").unlink(missing_ok=True)  # one of an earlier run
        else:
            plot.write(path.with_suffix(".svg"), chart)
        return told

    def _measured_before(self) -> dict[str, Any]:
        try:
            told = json.loads(self.results.read_text("utf-8"))
            same = told["settings"]["fingerprint"] == self.settings["fingerprint"]
        except (OSError, ValueError, KeyError):
            return {}
        return {name: told[name] for name in MEASURING if same and name in told}


def short_hash(path: Path) -> str:
    """What tells a file of data from another of the same name. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


async def forget(clients: Sequence[Client], experiment: str, path: Path) -> None:
    """Erases the memories that an earlier run has left in the servers, and empties its log; that goes last.

    Raises AnotherRun where that run still goes on.
    """
    with claimed(path) as log:
        for client in clients:
            await erase_all(client, experiment, path)
        log.truncate(0)


async def erase_all(client: Client, experiment: str, path: Path) -> None:
    """Erases the memories that the run of this log has left in the server."""
    run = head_of(path).get("run")
    if run is not None:
        prefix = f"{experiment}-{run}-"
        page = await client.call("GET", f"/tenants?limit=1000&after={prefix}")
        while page["tenants"] and page["tenants"][0].startswith(prefix):
            for tenant in page["tenants"]:
                if tenant.startswith(prefix):
                    await client.erase(tenant)
            page = await client.call("GET", f"/tenants?limit=1000&after={prefix}")


def measured(words: Sequence[str]) -> list[str]:
    """The command line without what has no bearing on the figures, such as where a user keeps the data and where
    the servers are; how many of these there were stays."""
    kept: list[str] = []
    skip = False
    for word in words:
        option = word.partition("=")[0].removeprefix("--").replace("-", "_")
        if skip or (word.startswith("--") and option in UNTOLD | {"also"}):
            if option == "also" and not skip:
                kept += ["--also", "URL"]
            skip = not skip and "=" not in word and option not in FLAGS
            continue
        name, sign, value = word.rpartition("=")
        kept.append(name + sign + Path(value).name if Path(value).is_absolute() else word)
    return kept


def flatten(error: BaseException) -> BaseException:
    """The first real error in a group of them."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def conduct(
    experiment: str,
    arguments: argparse.Namespace,
    body: Callable[[Session], Awaitable[dict[str, Any]]],
    extendable: Set[str] = frozenset(),
) -> dict[str, Any]:
    """Runs ``body`` with an open session. What the server refuses, or that there is none, ends it with a line."""

    async def run() -> dict[str, Any]:
        template = getattr(arguments, "template", None)
        async with Client(arguments.url, arguments.concurrency + 2, template) as client:
            session = Session(experiment, arguments, client)
            await session.open(extendable)
            try:
                return await body(session)
            finally:
                session.log.close()

    try:
        return asyncio.run(run())
    except (httpx.HTTPError, BaseExceptionGroup) as caught:
        error = flatten(caught)
        if not isinstance(error, httpx.HTTPError):
            raise
        raise SystemExit(
            f"the server at {arguments.url}: {error}; the same command goes on from here"
        ) from None
