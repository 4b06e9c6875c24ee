"""The keys file: JSON, readable by its owner and at most by its group, replaced whole and never changed in place."""

from __future__ import annotations

import os
import re
import stat
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import msgspec

from app.keys.ring import Key, Ring

_FORMAT = 1
_ID = re.compile(r"[0-9a-f]{12}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


class BadKeysFile(ValueError):
    """The file cannot be read, is damaged, or is open to others; the message is for the operator."""


class _File(msgspec.Struct, forbid_unknown_fields=True):
    format: int
    keys: list[Key]


def read(path: Path) -> Ring:
    """Raises BadKeysFile, also for a file that others may read or write."""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read()
    except OSError as error:
        raise BadKeysFile(f"the keys file {path} cannot be read: {error.strerror}") from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO) & ~stat.S_IRGRP:
        raise BadKeysFile(f"the keys file {path} is open to others: chmod 600 it")
    try:
        found = msgspec.json.decode(data, type=_File)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadKeysFile(f"the keys file {path} is damaged") from error
    ids = [key.id for key in found.keys]
    sound = all(_ID.fullmatch(k.id) and _DIGEST.fullmatch(k.digest) for k in found.keys)
    limits = all(0 <= limit < 2**63 for k in found.keys for limit in msgspec.structs.astuple(k.limits))
    bound = all(k.admin or (k.tenants and all(k.tenants)) for k in found.keys)
    if found.format != _FORMAT or len(set(ids)) < len(ids) or not (sound and limits and bound):
        raise BadKeysFile(f"the keys file {path} is damaged")
    return Ring(found.keys)


def write(path: Path, keys: Iterable[Key]) -> None:
    """Replaces the file, durably. A new one has mode 600; owner and group stay, and whether the group may read it, or a
    server of another user would go on with the keys of before. Raises OSError."""
    data = msgspec.json.format(msgspec.json.encode(_File(_FORMAT, list(keys))), indent=1) + b"\n"
    descriptor, name = tempfile.mkstemp(prefix=path.name, suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            with suppress(FileNotFoundError):
                before = path.stat()
                os.fchown(descriptor, before.st_uid, before.st_gid)
                os.fchmod(descriptor, before.st_mode & (stat.S_IRUSR | stat.S_IWUSR | stat.S_IRGRP))
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).rename(path)
    except BaseException:
        with suppress(OSError):
            Path(name).unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
