"""Replaying blocks on a pool: the draws are followed on indices first, then surviving vectors alone are copied."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from app.errors import FingerprintMismatch
from app.memory.codec import LONGEST_HEADER, Block, Pool, dtype_of, read_header
from app.model.forgetting import survivors

_Bytes = npt.NDArray[np.uint8]
_Rows = npt.NDArray[np.int64]
# a safetensors file begins with its header's length, in so many bytes
_LENGTH = 8
# bytes moved at a time: what stays in a processor's cache
_MOVED = 1 << 18


class Survival:
    """Which vectors of a base pool and of the blocks after it are left, and at which ranks.

    ``shape`` is the pool's, (L, N, d). Ranks are in order of age, so what is left of each lies together. Raises
    FingerprintMismatch if a block has another shape than the pool.
    """

    def __init__(self, shape: Sequence[int], blocks: Sequence[Block]) -> None:
        layers, size, width = shape
        # [1, or L if layers forget differently; N]: 0 for the base, n for the n-th block; which of its vectors. By
        # numpy, because torch's indexing shares its microseconds out among cores that have other work
        source, row = np.zeros((1, size), np.int64), np.arange(size)[None]
        for number, block in enumerate(blocks, 1):
            count = block.hidden.shape[1]
            if block.hidden.shape != (layers, count, width) or (
                block.forgotten is not None and count >= size
            ):
                raise FingerprintMismatch("a stored block has another shape than this model's memory")
            added = np.arange(count)
            if block.forgotten is None:
                row = np.tile(added, (len(source), size // count))
                source = np.full_like(source, number)
                continue
            keep = survivors(block.forgotten, size).numpy()
            rows = max(len(keep), len(source))
            source, row, keep = (np.broadcast_to(a, (rows, a.shape[1])) for a in (source, row, keep))
            end = (rows, count)
            source = np.hstack([np.take_along_axis(source, keep, 1), np.full(end, number)])
            row = np.hstack([np.take_along_axis(row, keep, 1), np.broadcast_to(added, end)])
        self._source, self._row = source, row
        counts = [np.bincount(each, minlength=len(blocks) + 1) for each in source]
        self._ends = np.cumsum(counts, axis=1).tolist()

    def of(self, number: int, layer: int) -> tuple[_Rows, slice]:
        """Which vectors of the base (0) or the n-th block are left in a layer, in order, and their ranks."""
        at = min(layer, len(self._ends) - 1)
        begin = self._ends[at][number - 1] if number else 0
        part = slice(begin, self._ends[at][number])
        return self._row[at, part], part

    def place(self, number: int, vectors: Tensor, pool: Tensor) -> None:
        """Copies what is left of ``vectors`` [L, n, d] to its ranks in ``pool`` [L, N, d]; the base may be ``pool``."""
        for layer in range(len(pool)):
            rows, part = self.of(number, layer)
            if vectors is pool:
                _move(_bytes(pool[layer]), rows)
            elif vectors.dtype == pool.dtype:
                _take(_bytes(vectors[layer]), rows, _bytes(pool[layer, part]))
            else:
                pool[layer, part] = vectors[layer, torch.from_numpy(rows)].to(pool.dtype)

    def born(self, base: Tensor, versions: Sequence[int]) -> Tensor:
        """The versions that wrote the ranks, from those of the base's int32 [L or 1, N] and of each block's."""
        rows = max(len(base), len(self._source))
        source, row, old = (
            np.broadcast_to(a, (rows, a.shape[1])) for a in (self._source, self._row, base.numpy())
        )
        new = np.array([0, *versions], old.dtype)[source]
        return torch.from_numpy(np.where(source == 0, np.take_along_axis(old, row, 1), new))


def replay(base: Pool, blocks: Iterable[tuple[int, Block]], *, reuse: bool = False) -> Pool:
    """The pool after ``blocks``, (version, block) pairs in order; ``base`` itself if there are none.

    ``reuse``: the base's memory may become the new pool's.

    Raises FingerprintMismatch if a block has another shape than the base.
    """
    versions, changes = [], []
    for version, block in blocks:
        versions.append(version)
        changes.append(block)
    if not changes:
        return base
    survival = Survival(base.hidden.shape, changes)
    pool = base.hidden if reuse else _room(base.hidden.shape, base.hidden.dtype)
    for number, vectors in enumerate([base.hidden, *(block.hidden for block in changes)]):
        survival.place(number, vectors, pool)
    return Pool(pool, survival.born(base.born, versions))


class Gathering:
    """Replays ``blocks`` on a snapshot while its bytes come from the store.

    What is left of a part is copied to its ranks while the part is in the processor's cache, and the rest is let go:
    memory is written once, and never with what was forgotten. Nobody has checked the bytes by then. ``feed`` takes
    whatever they are, and ``pool`` is for when they have proved to be what was written.

    ``shape`` is the pool's, (L, N, d); ``size`` the snapshot's in bytes. Raises FingerprintMismatch as ``replay``.
    """

    def __init__(self, shape: Sequence[int], size: int, blocks: Sequence[tuple[int, Block]]) -> None:
        self._shape, self._size = tuple(shape), size
        self._versions = [version for version, _ in blocks]
        self._blocks = [block.hidden for _, block in blocks]
        self._survival = Survival(shape, [block for _, block in blocks])
        self._head, self._missing = bytearray(), _LENGTH
        # where the next byte belongs, counted from the header's end
        self._at = 0
        self._tensors: list[tuple[int, int, Callable[[int, _Bytes], None]]] = []
        self._wrong: Exception | None = None

    def feed(self, part: memoryview) -> None:
        """Takes the next bytes, which are the caller's again on return. Raises nothing."""
        if self._wrong is None:
            try:
                self._feed(np.frombuffer(part, np.uint8))
            except (ValueError, LookupError, msgspec.DecodeError, FingerprintMismatch) as error:
                # most likely damage, which is for the store to say
                self._wrong = error

    def pool(self) -> Pool:
        """What the snapshot and the blocks make; all of its bytes were fed, and were right.

        Raises ValueError if they are no snapshot all the same, FingerprintMismatch if it has another shape.
        """
        if isinstance(self._wrong, FingerprintMismatch):
            raise self._wrong
        if self._wrong is not None or self._missing:
            raise ValueError("these bytes are no snapshot") from self._wrong
        return Pool(self._hidden, self._survival.born(self._born, self._versions))

    def _feed(self, part: _Bytes) -> None:
        while self._missing and len(part):
            self._head += part[: self._missing].data
            part, self._missing = part[self._missing :], max(0, self._missing - len(part))
            if self._missing:
                return
            if len(self._head) > _LENGTH:
                self._open()
                break
            self._missing = int.from_bytes(self._head, "little")
            if not 0 < self._missing <= min(self._size - _LENGTH, LONGEST_HEADER):
                raise ValueError("a snapshot's header is longer than one can be")
        begin, self._at = self._at, self._at + len(part)
        for first, last, take in self._tensors:
            inside = part[max(0, first - begin) : max(0, last - begin)]
            if len(inside):
                take(max(0, begin - first), inside)

    def _open(self) -> None:
        """Makes room for the tensors that the header tells of, and puts the blocks where they belong."""
        told = read_header(self._head[_LENGTH:])
        room = self._size - len(self._head)
        memory, born = told["memory"], told["born"]
        dtype = dtype_of(memory, room)
        layers, size, _ = self._shape
        if tuple(memory.shape) != self._shape or born.shape not in ([1, size], [layers, size]):
            raise FingerprintMismatch("a stored pool has another shape than this model's memory")
        self._hidden = _room(self._shape, dtype)
        self._rows = _bytes(self._hidden)
        self._born = torch.empty(born.shape, dtype=dtype_of(born, room))
        self._tensors = [(*memory.data_offsets, self._gather), (*born.data_offsets, self._copy_born)]
        for number, vectors in enumerate(self._blocks, 1):
            self._survival.place(number, vectors, self._hidden)
        self._kept = [self._survival.of(0, layer)[0] for layer in range(layers)]

    def _copy_born(self, at: int, part: _Bytes) -> None:
        self._born.view(-1).view(torch.uint8).numpy()[at : at + len(part)] = part

    def _gather(self, at: int, part: _Bytes) -> None:
        """Takes bytes of the pool from ``at`` on: as many whole vectors as lie together, else a vector's piece."""
        size, width = self._rows.shape[1:]
        while len(part):
            (layer, first), within = divmod(at // width, size), at % width
            kept = self._kept[layer]
            count = min(len(part) // width, size - first)
            if within or not count:
                piece = part[: width - within]
                rank = np.searchsorted(kept, first)
                if rank < len(kept) and kept[rank] == first:
                    self._rows[layer, rank, within : within + len(piece)] = piece
            else:
                piece = part[: count * width]
                begin, end = np.searchsorted(kept, (first, first + count))
                whole = piece.reshape(count, width)
                _take(whole, kept[begin:end] - first, self._rows[layer, begin:end])
            at, part = at + len(piece), part[len(piece) :]


def _room(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory for vectors, not cleared. Of numpy's, which asks for large pages: they are got faster."""
    return torch.from_numpy(np.empty((*shape[:-1], shape[-1] * dtype.itemsize), np.uint8)).view(dtype)


def _take(vectors: _Bytes, rows: _Rows, target: _Bytes) -> None:
    """As torch's ``index_select``, which shares a copy of microseconds out among all cores and waits for them: where
    they have other work, a replay of many blocks takes five times as long."""
    if len(rows):
        np.take(vectors, rows, axis=0, out=target, mode="clip")


def _move(vectors: _Bytes, rows: _Rows) -> None:
    """Row i becomes row ``rows``[i]. They rise, so that rows move to the front and what is still to be read is never
    written over. A few at a time: by way of all of them memory would be written twice."""
    between = np.empty((max(1, _MOVED // vectors.shape[1]), vectors.shape[1]), dtype=np.uint8)
    for begin in range(0, len(rows), len(between)):
        part = rows[begin : begin + len(between)]
        _take(vectors, part, between[: len(part)])
        vectors[begin : begin + len(part)] = between[: len(part)]


def _bytes(vectors: Tensor) -> _Bytes:
    """Their memory on the host, vector by vector."""
    found: _Bytes = vectors.view(torch.uint8).numpy()
    return found
