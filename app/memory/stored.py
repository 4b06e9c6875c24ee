"""A tenant's pool as the store has it, a layer at a time: what takes two pools at once takes two layers so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from types import TracebackType

import msgspec
import torch
from torch import Tensor

from app.memory.codec import LONGEST_HEADER, Block, Entry, Pool, dtype_of, read_header
from app.memory.replay import replay
from app.store.base import BlobRef, Manifest, Store
from app.store.reading import BlobReader


class _Layers:
    """A blob whose tensor ``large`` [L, rows, d] comes by layers; ``small``, if it is there, at once.

    Iterating gives the layers, once; when the last has come all of the blob is checked. Raises as ``BlobReader``.
    """

    def __init__(self, reader: BlobReader, large: str, small: str) -> None:
        self._reader = reader
        entries, start = self._header()
        self.dtype, begin, end = self._place(entries.get(large), start)
        self.shape = entries[large].shape
        if len(self.shape) != 3:
            raise self._reader.damaged()
        self._each = (end - begin) // max(1, self.shape[0])
        # what is small is read ahead; it must be the same when it comes by
        self._before = reader.peek(0, start + begin)
        self._after = reader.peek(start + end, reader.size - start - end)
        self.small = None
        if small in entries:
            dtype, first, last = self._place(entries[small], start)
            data = self._before[start + first : start + last] if last <= begin else self._after[first - end :]
            data = data[: last - first]
            if len(data) != last - first or not data:
                raise self._reader.damaged()
            self.small = torch.frombuffer(bytearray(data), dtype=dtype).reshape(entries[small].shape)

    def needed(self) -> Tensor:
        """``small``, which must be there."""
        if self.small is None:
            raise self._reader.damaged()
        return self.small

    def _header(self) -> tuple[dict[str, Entry], int]:
        """The tensors' entries, and where their bytes begin."""
        length = int.from_bytes(self._reader.peek(0, 8), "little")
        if length > LONGEST_HEADER:
            raise self._reader.damaged()
        try:
            return read_header(self._reader.peek(8, length)), 8 + length
        except (msgspec.DecodeError, ValueError, RecursionError):
            raise self._reader.damaged() from None

    def _place(self, entry: Entry | None, start: int) -> tuple[torch.dtype, int, int]:
        """A tensor's dtype, and its bytes' begin and end behind ``start``."""
        try:
            if entry is None:
                raise ValueError("it is missing")
            return dtype_of(entry, self._reader.size - start), *entry.data_offsets
        except (KeyError, ValueError):
            raise self._reader.damaged() from None

    def __iter__(self) -> Iterator[Tensor]:
        self._pass(self._before)
        for _ in range(self.shape[0]):
            yield torch.frombuffer(self._reader.take(self._each), dtype=self.dtype).reshape(self.shape[1:])
        self._pass(self._after)
        self._reader.finish()

    def verify(self) -> None:
        self._reader.verify()

    def _pass(self, seen: memoryview) -> None:
        if self._reader.take(len(seen)) != seen:
            raise self._reader.damaged()


class StoredPool:
    """The pool [L, N, d] of ``manifest``, in rank order. ``own`` is the pool that a memory without a snapshot began
    with, on the host. A context: all blobs are open from its beginning to its end.

    Raises as ``Store.reader``: VersionConflict above all, if compaction has taken a blob away meanwhile.
    """

    def __init__(self, store: Store, manifest: Manifest, own: Pool) -> None:
        self._own = own
        self._versions = [block.version for block in manifest.blocks]
        self._born: list[Tensor] = []
        with ExitStack() as stack:

            def layers(blob: BlobRef, large: str, small: str) -> _Layers:
                return _Layers(stack.enter_context(store.reader(manifest.tenant, blob)), large, small)

            snapshot = manifest.snapshot
            self._base = None if snapshot is None else layers(snapshot.blob, "memory", "born")
            self._blocks = [layers(block.blob, "block", "forgotten") for block in manifest.blocks]
            self._open = stack.pop_all()

    def __enter__(self) -> StoredPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._own.hidden.shape if self._base is None else self._base.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self._own.hidden.dtype if self._base is None else self._base.dtype

    @property
    def born(self) -> Tensor:
        """int32 [L or 1, N], see ``Pool``; whole once all layers have come."""
        return torch.cat(self._born)

    def _replayed(self, base: Pool, blocks: list[tuple[int, Block]]) -> Pool:
        try:
            return replay(base, blocks, reuse=self._base is not None)
        except Exception:
            # of what was read ahead nobody knows yet whether it is sound
            for each in (self._base, *self._blocks):
                if each is not None:
                    each.verify()
            raise

    def layers(self) -> Iterator[Tensor]:
        """[N, d] of each layer, from the first on; once. What came is to be believed when the last has come."""
        forgotten = [block.small.long() if block.small is not None else None for block in self._blocks]
        born = self._own.born
        if self._base is not None:
            born = self._base.needed()
        of_all = all(rows is None or rows.shape[0] == 1 for rows in (born, *forgotten))
        base = self._own.hidden if self._base is None else self._base
        for layer, (hidden, *blocks) in enumerate(zip(base, *self._blocks, strict=True)):
            told = [
                (version, Block(block[None], None if rows is None else _row(rows, layer)))
                for version, block, rows in zip(self._versions, blocks, forgotten, strict=True)
            ]
            pool = self._replayed(Pool(hidden.cpu()[None], _row(born, layer)), told)
            if not layer or not of_all:
                self._born.append(pool.born)
            yield pool.hidden[0]


def _row(rows: Tensor, layer: int) -> Tensor:
    """``layer``'s own [1, …] of [L or 1, …]."""
    return rows if rows.shape[0] == 1 else rows[layer : layer + 1]
