"""Answers go to standard output, everything else to standard error."""

from __future__ import annotations

import json
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


@contextmanager
def working(what: str, *, json: bool) -> Iterator[None]:
    """Shows on a terminal that something is under way, and for how long: of one call nobody knows how far it is."""
    with Progress(
        SpinnerColumn(),
        TextColumn("[progress.description]{task.description}"),
        TimeElapsedColumn(),
        console=err,
        disable=json or not err.is_terminal,
        transient=True,
    ) as progress:
        progress.add_task(what, total=None)
        yield


def print_json(value: Any) -> None:
    """One JSON document on one line, for scripts."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def write(text: str) -> None:
    """Text at once and as it is; on a terminal without the control characters that could steer it."""
    sys.stdout.write(visible(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def visible(text: str) -> str:
    """``text`` with control characters other than line feed and tab written as escapes."""
    return "".join(
        character
        if character in "\n\t" or unicodedata.category(character) != "Cc"
        else ascii(character)[1:-1]
        for character in text
    )


def one_line(text: str, width: int) -> str:
    """``text`` on one line of at most ``width`` characters."""
    line = visible(" ".join(text.split()))
    return line if len(line) <= width else line[: width - 1] + "…"
