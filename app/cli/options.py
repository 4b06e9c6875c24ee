"""What several commands share: options, and text from where the user has it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from app.cli.errors import USAGE, Refusal
from app.cli.output import err

Url = Annotated[
    str, typer.Option("--url", envvar="MEMORYLLM_URL", help="the server's address", show_default=True)
]
Tenant = Annotated[
    str, typer.Option("--tenant", "-t", envvar="MEMORYLLM_TENANT", help="whose memory", show_default=True)
]
Json = Annotated[bool, typer.Option("--json", help="print JSON, for scripts; errors too")]
DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_TENANT = "default"


def text_of(argument: str) -> str:
    """``argument``, or all of standard input if it is ``-``. Raises Refusal."""
    if argument != "-":
        return argument
    # standard input may have been closed before this began, which its type does not say
    if sys.stdin is None:
        raise Refusal("there is no standard input to read", USAGE)
    if sys.stdin.isatty():
        err.print("type the text, then Ctrl-D", style="dim")
    return _decode(sys.stdin.buffer.read(), "standard input")


def file_text(path: Path) -> str:
    """A UTF-8 file's text, with or without a byte order mark. Raises Refusal."""
    try:
        return _decode(path.read_bytes(), str(path))
    except OSError as error:
        raise Refusal(f"{path} cannot be read: {error.strerror}", USAGE) from error


def _decode(raw: bytes, name: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refusal(f"{name} is not UTF-8 text (byte {error.start})", USAGE) from error
