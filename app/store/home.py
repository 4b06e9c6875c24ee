"""A store's directory: who owns it, of which format it is, and where each tenant lives in it.

    LOCK                        flock-ed by the one server that owns the store
    FORMAT                      the layout's name; another one is refused
    KEY                         proof of the text key, once there was one
    tenants/<2 hex>/<id>/       a tenant: name, manifest, its journal, blobs
    staging/, trash/            half-made and half-erased tenants; emptied at start

The id is a hash of the tenant's name; the name as typed never reaches a path.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import secrets
import time
from contextlib import suppress
from pathlib import Path

import msgspec

from app.errors import StoreFailed
from app.store.files import FileSystem, remove_tree, replace_durably, translated
from app.store.records import Damaged, seal, unseal
from app.store.texts import Texts

STORE_FORMAT = "memoryllm-store 2"
# read and made 2 of, whose manifests may go on in journals
_OLDER_FORMAT = "memoryllm-store 1"
_ID = re.compile(r"[0-9a-f]{32}")
_FAN = re.compile(r"[0-9a-f]{2}")
_SEALED_NAME = re.compile(rb'("[^\n]*")\Z')
_NAME_IN_MANIFEST = re.compile(rb'"tenant":("(?:[^"\\]|\\.)*")')
_BEFORE_FORMAT = {"LOCK", "FORMAT.tmp", "lost+found"}


def tenant_id(tenant: str) -> str:
    return hashlib.blake2b(tenant.encode(), digest_size=16).hexdigest()


class Home:
    """Owns ``root`` from construction to ``close``. Raises StoreFailed (or StoreFull, if it must be made).

    ``patience`` is how many seconds to wait for another owner to go: a killed server's worker may take a while.
    """

    def __init__(self, root: Path, files: FileSystem, texts: Texts, patience: float) -> None:
        self.root = root.absolute()
        self.tenants = self.root / "tenants"
        self.trash = self.root / "trash"
        self._staging = self.root / "staging"
        self._files = files
        with translated(f"opening {self.root}"):
            self._make_root()
            self._lock = self._take_lock(patience)
            try:
                self._check_format()
                self._check_key(texts)
                for directory in (self.tenants, self._staging, self.trash):
                    if not files.exists(directory):
                        files.make_directory(directory)
                files.sync_directory(self.root)
                if files.list(self.trash):
                    # or a tenant, renamed away by a server that was killed then, comes back as an empty one
                    for fan in filter(_FAN.fullmatch, files.list(self.tenants)):
                        files.sync_directory(self.tenants / fan)
                for directory in (self._staging, self.trash):
                    for left in files.list(directory):
                        with suppress(OSError):
                            remove_tree(files, directory / left)
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        if self._lock >= 0:
            # closing alone leaves it locked while anybody else has the file open too: a process that looks through
            # /proc for a moment, or a child between its fork and its exec
            fcntl.flock(self._lock, fcntl.LOCK_UN)
            os.close(self._lock)
            self._lock = -1

    # ------------------------------------------------------------ opening

    def _make_root(self) -> None:
        missing = [path for path in (self.root, *self.root.parents) if not self._files.exists(path)]
        for path in reversed(missing):
            self._files.make_directory(path)
            self._files.sync_directory(path.parent)

    def _take_lock(self, patience: float) -> int:
        descriptor = os.open(self.root / "LOCK", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        until = time.monotonic() + patience
        try:
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return descriptor
                except BlockingIOError as error:
                    if time.monotonic() >= until:
                        raise StoreFailed(f"another server has the store {self.root} open") from error
                    time.sleep(0.05)
        except BaseException:
            os.close(descriptor)
            raise

    def _check_format(self) -> None:
        path = self.root / "FORMAT"
        if not self._files.exists(path):
            if set(self._files.list(self.root)) - _BEFORE_FORMAT:
                raise StoreFailed(f"{self.root} is not empty and has no FORMAT file: it is not a store")
            # a crash may have come between making the directory and syncing the one it is in
            with suppress(PermissionError):
                self._files.sync_directory(self.root.parent)
            replace_durably(self._files, path, STORE_FORMAT.encode() + b"\n")
        found = self._files.read(path)
        if found == _OLDER_FORMAT.encode() + b"\n":
            found = STORE_FORMAT.encode() + b"\n"
            replace_durably(self._files, path, found)
        if found != STORE_FORMAT.encode() + b"\n":
            shown = found[:64].decode("utf-8", "replace").strip()
            raise StoreFailed(f"the store {self.root} has the format {shown!r}, not {STORE_FORMAT!r}")

    def _check_key(self, texts: Texts) -> None:
        path = self.root / "KEY"
        if not self._files.exists(path):
            if texts.encrypting:
                replace_durably(self._files, path, seal(texts.proof()))
            return
        if not texts.encrypting:
            if texts.keep:
                raise StoreFailed(
                    f"the store {self.root} holds encrypted texts: give it the text key, "
                    "or switch keeping texts off"
                )
            return
        try:
            proof = unseal(self._files.read(path), str)
        except Damaged as error:
            raise StoreFailed(
                f"{path} is damaged; remove it to have it made again from the text key"
            ) from error
        if not texts.proves(proof):
            raise StoreFailed(f"this is not the text key that the store {self.root} was written with")

    # ------------------------------------------------------------ places

    def directory(self, tenant: str) -> Path:
        name = tenant_id(tenant)
        return self.tenants / name[:2] / name

    def new_staging(self) -> Path:
        return self._staging / secrets.token_hex(16)

    def new_trash(self) -> Path:
        return self.trash / secrets.token_hex(16)

    def ids(self) -> list[str]:
        """Of all tenants. Raises StoreFailed."""
        with translated("listing the tenants"):
            fans = filter(_FAN.fullmatch, self._files.list(self.tenants))
            return [id for fan in fans for id in filter(_ID.fullmatch, self._files.list(self.tenants / fan))]

    def name(self, id: str) -> str | None:
        """The tenant's name from the small file beside the manifest; from the manifest only if that is damaged.

        The directory's own name proves the tenant's, so that it can be picked out of damaged files too.
        """
        directory = self.tenants / id[:2] / id
        for file, pattern in (("name", _SEALED_NAME), ("manifest", _NAME_IN_MANIFEST)):
            with suppress(OSError):
                for match in pattern.finditer(self._files.read(directory / file)):
                    with suppress(msgspec.DecodeError, UnicodeError):
                        tenant = msgspec.json.decode(match[1], type=str)
                        if tenant_id(tenant) == directory.name:
                            return tenant
        return None
