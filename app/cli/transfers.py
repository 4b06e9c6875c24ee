"""``memoryllm tenants export`` and ``import``: a memory as a file, with progress."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import typer
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from app.cli.errors import FAILED, USAGE, Refusal
from app.cli.http import Api, tenant_path
from app.cli.options import DEFAULT_URL, Json, Url
from app.cli.output import err, out, print_json
from app.cli.tenants import Name, show_tenant

_PIECE = 1 << 20


@contextmanager
def _progress(what: str, size: int | None, *, show: bool) -> Iterator[tuple[Progress, TaskID]]:
    with Progress(
        TextColumn("[progress.description]{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=err,
        disable=not show,
        transient=True,
    ) as progress:
        yield progress, progress.add_task(what, total=size)


@contextmanager
def _whole_file(path: Path, *, force: bool) -> Iterator[BinaryIO]:
    """A file that appears at ``path`` when the context ends well, and otherwise not at all. Raises Refusal."""
    if path.is_dir():
        raise Refusal(f"{path} is a directory", USAGE)
    if not force and path.exists():
        raise Refusal(f"{path} exists already: say --force to replace it", USAGE)
    coming = path.with_name(f".{path.name[:200]}.{os.getpid()}.part")
    try:
        # a memory is as private as what it was told
        with os.fdopen(os.open(coming, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        coming.replace(path)
    except OSError as error:
        raise Refusal(f"{path} cannot be written: {error.strerror or error}", USAGE) from error
    finally:
        with suppress(OSError):
            coming.unlink(missing_ok=True)


@contextmanager
def _standard_output() -> Iterator[BinaryIO]:
    if sys.stdout.isatty():
        raise Refusal("a memory is no text for a terminal: name a file, or send it into a pipe", USAGE)
    yield sys.stdout.buffer
    sys.stdout.buffer.flush()


def export(
    tenant: Name,
    file: Annotated[Path, typer.Argument(help="where to; - writes to standard output")],
    texts: Annotated[bool, typer.Option("--texts", help="put the kept texts of its updates into it")] = False,
    force: Annotated[bool, typer.Option("--force", "-f", help="replace a file that is there")] = False,
    url: Url = DEFAULT_URL,
    json: Json = False,
) -> None:
    """Write a memory into a safetensors file, whole or not at all."""
    piped = str(file) == "-"
    with Api(url, as_json=json) as api:
        target = _standard_output() if piped else _whole_file(file, force=force)
        query = {"texts": "true"} if texts else {}
        with target as to, api.download(tenant_path(tenant, "/export"), **query) as (told, pieces):
            size = int(told["content-length"]) if told.get("content-length", "").isdigit() else None
            with _progress("exporting", size, show=err.is_terminal and not json) as (progress, bar):
                taken = 0
                for piece in pieces:
                    to.write(piece)
                    taken += len(piece)
                    progress.update(bar, completed=taken)
            if size is None or taken != size:
                raise Refusal("the server broke off the file", FAILED)
        answer: dict[str, Any] = {
            "tenant": tenant,
            "memory_version": int(told.get("x-memory-version", "0")),
            "bytes": taken,
        }
        if piped:
            return
        if json:
            print_json(answer | {"file": str(file)})
        else:
            version = answer["memory_version"]
            out.print(f"{file}: {tenant!r} at version {version}, {taken:,} bytes", markup=False)


def import_(
    tenant: Name,
    file: Annotated[Path, typer.Argument(help="an exported memory; - reads standard input")],
    url: Url = DEFAULT_URL,
    json: Json = False,
) -> None:
    """Make a new tenant of an exported memory; the server checks all of it first."""
    with Api(url, as_json=json) as api:
        show = err.is_terminal and not json
        with _source(file) as (source, size), _progress("importing", size, show=show) as (progress, bar):

            def pieces() -> Iterator[bytes]:
                while piece := source.read(_PIECE):
                    yield piece
                    progress.advance(bar, len(piece))

            answer = api.upload(tenant_path(tenant, "/import"), pieces(), size)
        print_json(answer) if json else show_tenant(answer)


@contextmanager
def _source(path: Path) -> Iterator[tuple[BinaryIO, int | None]]:
    """An open file and its size, if it has one. Raises Refusal."""
    if str(path) == "-":
        if sys.stdin.isatty():
            raise Refusal("a memory cannot be typed: name a file, or send it through a pipe", USAGE)
        yield sys.stdin.buffer, None
        return
    try:
        file = path.open("rb")
    except OSError as error:
        raise Refusal(f"{path} cannot be read: {error.strerror}", USAGE) from error
    with file:
        found = os.fstat(file.fileno())
        yield file, found.st_size if path.is_file() else None


def register(app: typer.Typer) -> None:
    app.command("export")(export)
    app.command("import")(import_)
