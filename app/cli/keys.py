"""``memoryllm keys``: make, list and revoke the API keys of a server on this machine."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from pydantic import TypeAdapter, ValidationError
from rich.table import Column, Table

from app.cli.errors import REFUSED, USAGE, Refusal
from app.cli.options import Json
from app.cli.output import err, out, print_json, visible
from app.keys.file import BadKeysFile, read, write
from app.keys.ring import Key, Limits, make
from app.settings import Bytes

app = typer.Typer(help="Make, list and revoke API keys.", no_args_is_help=True)

File = Annotated[
    Path,
    typer.Option("--file", envvar="MEMORYLLM_KEYS_FILE", help="the server's keys file", show_default=False),
]


@contextmanager
def _changing(path: Path, *, as_json: bool) -> Iterator[list[Key]]:
    """The keys, to be changed in place; nobody else changes the file meanwhile. Raises Refusal."""
    try:
        lock = os.open(path.with_name(path.name + ".lock"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            keys = list(read(path).keys) if path.exists() else []
            yield keys
            write(path, keys)
        finally:
            os.close(lock)
    except BadKeysFile as error:
        raise Refusal(str(error), USAGE, as_json=as_json) from error
    except OSError as error:
        raise Refusal(f"{path} cannot be written: {error.strerror}", USAGE, as_json=as_json) from error


def _bytes(text: str, *, as_json: bool) -> int:
    try:
        return TypeAdapter(Bytes).validate_python(text)
    except ValidationError as error:
        raise Refusal("--max-bytes is a size, such as 512MiB", USAGE, as_json=as_json) from error


@app.command()
def create(
    file: File,
    tenant: Annotated[
        list[str] | None,
        typer.Option(
            "--tenant",
            "-t",
            help="whom it is for; may be given often; a * at the end takes all that begin so",
        ),
    ] = None,
    admin: Annotated[bool, typer.Option("--admin", help="for all tenants, and for metrics")] = False,
    name: Annotated[str, typer.Option("--name", help="a note to know it by")] = "",
    updates_per_day: Annotated[
        int,
        typer.Option(
            "--updates-per-day", min=0, max=2000, help="contexts within 24 hours (0: the server's default)"
        ),
    ] = 0,
    max_bytes: Annotated[
        str, typer.Option("--max-bytes", help="bytes in the store, as 512MiB (0: the default)")
    ] = "0",
    concurrent: Annotated[
        int,
        typer.Option("--concurrent", min=0, max=1_000_000, help="requests at once (0: the server's default)"),
    ] = 0,
    weight: Annotated[
        int,
        typer.Option("--weight", min=0, max=1000, help="share of a busy server, where others have 1 (0: 1)"),
    ] = 0,
    as_json: Json = False,
) -> None:
    """Make a key and print it. This is the only time it is shown: the file keeps its hash."""
    tenants = tuple(tenant or ())
    if admin == bool(tenants):
        raise Refusal("a key is for tenants (--tenant) or for an admin (--admin)", USAGE, as_json=as_json)
    if any(not bound.rstrip("*") and not admin for bound in tenants):
        raise Refusal("a tenant is needed before the *", USAGE, as_json=as_json)
    # imported here: the client commands need none of the server
    from app.api.schemas import check_tenant

    try:
        for bound in tenants:
            check_tenant(bound)
    except ValueError as error:
        raise Refusal(str(error), USAGE, as_json=as_json) from error
    if name and not name.isprintable():
        raise Refusal("--name has printable characters only", USAGE, as_json=as_json)
    limits = Limits(updates_per_day, _bytes(max_bytes, as_json=as_json), concurrent, weight)
    with _changing(file, as_json=as_json) as keys:
        key, entry = make(name=name, tenants=tenants, admin=admin, limits=limits)
        keys.append(entry)
    if as_json:
        print_json({"id": entry.id, "key": key})
        return
    err.print(f"key {entry.id}; it is not shown again:", style="dim")
    print(key)


@app.command("list")
def list_(file: File, as_json: Json = False) -> None:
    """The keys that there are, without the keys themselves."""
    try:
        keys = read(file).keys
    except BadKeysFile as error:
        raise Refusal(str(error), USAGE, as_json=as_json) from error
    if as_json:
        shown = [
            {
                "id": key.id, "name": key.name, "tenants": list(key.tenants), "admin": key.admin,
                "created": key.created, "updates_per_day": key.limits.updates_per_day,
                "bytes": key.limits.bytes, "concurrent": key.limits.concurrent,
                "weight": key.limits.weight,
            }
            for key in keys
        ]  # fmt: skip
        print_json({"keys": shown})
        return
    # whoever revokes a key needs the whole of its id, however narrow the terminal
    whole = Column("id", no_wrap=True)
    titles = ("for", "name", "made", "updates a day", "bytes", "at once", "weight")
    rest = [Column(title, overflow="fold") for title in titles]
    table = Table(whole, *rest, box=None, pad_edge=False)
    for key in keys:
        bound = "admin" if key.admin else ", ".join(map(visible, key.tenants))
        made = time.strftime("%Y-%m-%d", time.gmtime(key.created))
        limits = [f"{limit:,}" if limit else "" for limit in _astuple(key.limits)]
        table.add_row(key.id, bound, visible(key.name), made, *limits)
    out.print(table)


def _astuple(limits: Limits) -> tuple[int, int, int, int]:
    return limits.updates_per_day, limits.bytes, limits.concurrent, limits.weight


@app.command()
def revoke(
    id: Annotated[str, typer.Argument(help="as keys list shows it")], file: File, as_json: Json = False
) -> None:
    """Take a key away. A running server notices within a second."""
    with _changing(file, as_json=as_json) as keys:
        left = [key for key in keys if key.id != id]
        if len(left) == len(keys):
            raise Refusal("there is no key of this id", REFUSED, as_json=as_json)
        keys[:] = left
    if as_json:
        print_json({"id": id})
        return
    err.print(f"key {id} is revoked", style="dim")
