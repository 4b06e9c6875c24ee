"""A disk in memory that forgets what was not synced, fails when told to, and can be copied as a crash leaves it."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from app.store.files import File, Source
from tests.fakes import Piecewise

# what a crash leaves: only what was synced; every name, but of unsynced files only a half; everything; or of
# each unsynced change, drawn for itself, all, nothing or a torn part
Kept = Literal["synced", "names", "all"] | random.Random
Hook = Callable[[str, Path], None]

_MOST_WRITTEN = 300
_SECTOR = 128


class Crash(BaseException):
    """The process dies here: nothing catches it, nothing is cleaned up."""


class Leaf:
    def __init__(self, now: bytes = b"", safe: bytes | None = None) -> None:
        self.now = bytearray(now)
        self.safe = safe
        self.lost = False

    def after_crash(self, kept: Kept) -> Leaf:
        left = self.safe
        if left is not None and left != self.now and len(left) == len(self.now):
            # written over in place: what was not synced is there in part, sector by sector or up to some byte
            left = self._overwritten(left, kept)
        elif isinstance(kept, random.Random):
            torn = bytes(self.now[: kept.randrange(len(self.now) + 1)])
            left = (
                left if left is not None else kept.choice([b"", torn, bytes(len(self.now)), bytes(self.now)])
            )
        elif kept == "all":
            left = bytes(self.now)
        elif left is None:
            left = bytes(self.now[: len(self.now) // 2]) if kept == "names" else b""
        return Leaf(left, left)

    def _overwritten(self, safe: bytes, kept: Kept) -> bytes:
        now = bytes(self.now)
        if not isinstance(kept, random.Random):
            return now if kept == "all" else safe
        if kept.randrange(2):
            sectors = range(0, len(now), _SECTOR)
            return b"".join(kept.choice([now, safe])[at : at + _SECTOR] for at in sectors)
        changed = [at for at, (new, old) in enumerate(zip(now, safe, strict=True)) if new != old]
        cut = kept.choice(changed) + kept.randrange(2)
        return now[:cut] + safe[cut:] if kept.randrange(2) else safe[:cut] + now[cut:]


class Folder:
    def __init__(self) -> None:
        self.now: dict[str, Leaf | Folder] = {}
        self.safe: dict[str, Leaf | Folder] = {}

    def after_crash(self, kept: Kept, leaves: dict[int, Leaf] | None = None) -> Folder:
        leaves = {} if leaves is None else leaves
        folder = Folder()
        names = self.safe if kept == "synced" else self.now
        if isinstance(kept, random.Random):
            drawn = {name: kept.choice([self.now, self.safe]) for name in sorted({*self.now, *self.safe})}
            names = {name: found[name] for name, found in drawn.items() if name in found}
        for name, node in names.items():
            if isinstance(node, Folder):
                folder.now[name] = node.after_crash(kept, leaves)
            else:
                # a file of two names is one file still
                if id(node) not in leaves:
                    leaves[id(node)] = node.after_crash(kept)
                folder.now[name] = leaves[id(node)]
        folder.safe = dict(folder.now)
        return folder


def _error(number: int, path: Path) -> OSError:
    return OSError(number, os.strerror(number), str(path))


class MemoryDisk:
    """``before`` and ``after`` see every call that changes something, and may raise. ``links`` says whether it
    has hard links."""

    def __init__(self, root: Path, folder: Folder | None = None, *, links: bool = True) -> None:
        self.root = root
        self.links = links
        self.folder = folder or Folder()
        self.before: Hook = lambda call, path: None
        self.after: Hook = lambda call, path: None
        self.reads: list[Path] = []

    def after_crash(self, kept: Kept) -> MemoryDisk:
        """A disk as it would be found if the power failed now; this one is left alone."""
        return MemoryDisk(self.root, self.folder.after_crash(kept), links=self.links)

    def leaves(self) -> Iterator[tuple[Path, Leaf]]:
        def walk(path: Path, folder: Folder) -> Iterator[tuple[Path, Leaf]]:
            for name, node in sorted(folder.now.items()):
                if isinstance(node, Folder):
                    yield from walk(path / name, node)
                else:
                    yield path / name, node

        return walk(self.root, self.folder)

    # ------------------------------------------------------------ the protocol

    def create(self, path: Path) -> File:
        self.before("create", path)
        folder = self._folder(path.parent)
        if path.name in folder.now:
            raise _error(errno.EEXIST, path)
        leaf = folder.now[path.name] = Leaf()
        self.after("create", path)
        return MemoryFile(self, path, leaf)

    def fill(self, path: Path) -> File:
        node = self._node(path)
        assert isinstance(node, Leaf)
        assert not node.now, "a file that is filled is empty"
        return MemoryFile(self, path, node)

    def edit(self, path: Path) -> File:
        node = self._node(path)
        if isinstance(node, Folder):
            raise _error(errno.EISDIR, path)
        return MemoryFile(self, path, node, in_place=True)

    def rename(self, source: Path, target: Path) -> None:
        self.before("rename", target)
        origin, goal = self._folder(source.parent), self._folder(target.parent)
        node = self._node(source)
        there = goal.now.get(target.name)
        if isinstance(node, Folder) != isinstance(there, Folder) and there is not None:
            raise _error(errno.EISDIR, target)
        if isinstance(there, Folder) and there.now:
            raise _error(errno.ENOTEMPTY, target)
        del origin.now[source.name]
        goal.now[target.name] = node
        self.after("rename", target)

    def link(self, source: Path, target: Path) -> None:
        self.before("link", target)
        node, folder = self._node(source), self._folder(target.parent)
        if isinstance(node, Folder) or not self.links:
            raise _error(errno.EPERM, source)
        if target.name in folder.now:
            raise _error(errno.EEXIST, target)
        folder.now[target.name] = node
        self.after("link", target)

    def sync_directory(self, path: Path) -> None:
        self.before("sync_directory", path)
        folder = self._folder(path)
        folder.safe = dict(folder.now)
        self.after("sync_directory", path)

    def make_directory(self, path: Path) -> None:
        self.before("make_directory", path)
        folder = self._folder(path.parent)
        if path.name in folder.now:
            raise _error(errno.EEXIST, path)
        folder.now[path.name] = Folder()
        self.after("make_directory", path)

    def read(self, path: Path) -> bytes:
        self.reads.append(path)
        node = self._node(path)
        if isinstance(node, Folder):
            raise _error(errno.EISDIR, path)
        return bytes(node.now)

    def read_into(self, path: Path, buffer: memoryview, seen: Callable[[memoryview], None]) -> int:
        data = self.read(path)[: len(buffer)]
        buffer[: len(data)] = data
        seen(buffer[: len(data)])
        return len(data)

    def expect(self, path: Path, size: int) -> None:
        self._node(path)

    def source(self, path: Path) -> Source:
        return Piecewise(self.read(path))

    def size(self, path: Path) -> int:
        node = self._node(path)
        return 4096 if isinstance(node, Folder) else len(node.now)

    def remove(self, path: Path) -> None:
        self.before("remove", path)
        if isinstance(self._node(path), Folder):
            raise _error(errno.EISDIR, path)
        del self._folder(path.parent).now[path.name]
        self.after("remove", path)

    def remove_directory(self, path: Path) -> None:
        self.before("remove_directory", path)
        if self._folder(path).now:
            raise _error(errno.ENOTEMPTY, path)
        del self._folder(path.parent).now[path.name]
        self.after("remove_directory", path)

    def list(self, path: Path) -> list[str]:
        return list(self._folder(path).now)

    def exists(self, path: Path) -> bool:
        try:
            self._node(path)
        except FileNotFoundError:
            return False
        return True

    # ------------------------------------------------------------ inside

    def _node(self, path: Path) -> Leaf | Folder:
        node: Leaf | Folder = self.folder
        if self.root.is_relative_to(path):
            return node
        for name in path.relative_to(self.root).parts:
            if not isinstance(node, Folder):
                raise _error(errno.ENOTDIR, path)
            if name not in node.now:
                raise _error(errno.ENOENT, path)
            node = node.now[name]
        return node

    def _folder(self, path: Path) -> Folder:
        node = self._node(path)
        if not isinstance(node, Folder):
            raise _error(errno.ENOTDIR, path)
        return node


class MemoryFile:
    """Calls on a file that is written over in place, and so needs no more room, have names of their own."""

    def __init__(self, disk: MemoryDisk, path: Path, leaf: Leaf, *, in_place: bool = False) -> None:
        self._disk, self._path, self._leaf = disk, path, leaf
        self._sync = "sync_over" if in_place else "sync"

    def write(self, data: memoryview) -> int:
        self._disk.before("write", self._path)
        taken = data[:_MOST_WRITTEN]
        self._leaf.now += taken
        self._disk.after("write", self._path)
        return len(taken)

    def write_at(self, data: memoryview, offset: int) -> int:
        self._disk.before("write_over", self._path)
        taken = data[:_MOST_WRITTEN]
        assert offset + len(data) <= len(self._leaf.now), "a file written over in place keeps its size"
        self._leaf.now[offset : offset + len(taken)] = taken
        self._disk.after("write_over", self._path)
        return len(taken)

    def sync(self) -> None:
        try:
            self._disk.before(self._sync, self._path)
        except OSError:
            # a kernel drops the pages it could not write: another fsync succeeds and saves nothing
            self._leaf.lost = True
            raise
        if not self._leaf.lost:
            self._leaf.safe = bytes(self._leaf.now)
        self._disk.after(self._sync, self._path)

    def close(self) -> None:
        self._disk.before("close", self._path)
        self._disk.after("close", self._path)
