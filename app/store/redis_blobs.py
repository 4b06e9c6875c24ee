"""A tenant's blobs in Redis: chunks of at most 16 MiB, and a hash that knows of each before it is written."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from app.errors import ServiceError
from app.store.base import BlobRef, Manifest
from app.store.files import Source
from app.store.lineages import Copy, blobs_of
from app.store.parts import new_name, quarantined, require_name
from app.store.records import blob_checksum
from app.store.redis_leases import Keys
from app.store.redis_server import Server

CHUNK = 16 * 2**20


def chunks(size: int) -> int:
    """How many keys a blob of ``size`` bytes takes."""
    return max(1, -(-size // CHUNK))


class _Chunks:
    """A blob's bytes, fetched when they are asked for; ``key`` names the chunk of a number."""

    def __init__(self, server: Server, key: Callable[[int], str], blob: BlobRef) -> None:
        self._server, self._key, self._blob = server, key, blob

    def read_at(self, buffer: memoryview, offset: int) -> int:
        """Raises FileNotFoundError, StoreFailed."""
        number, begin = divmod(offset, CHUNK)
        if number >= chunks(self._blob.size):
            return 0
        key, size = self._key(number), min(len(buffer), CHUNK - begin)
        piece = self._server.again(
            "reading a blob", lambda: self._server.client.getrange(key, begin, begin + size - 1)
        )
        # of a key that is missing the server says what it says of one that is too short
        if not piece and not self._server.again("reading a blob", lambda: self._server.client.exists(key)):
            raise FileNotFoundError(self._blob.name)
        buffer[: len(piece)] = piece
        return len(piece)

    def close(self) -> None: ...


class RedisBlobs:
    """Writes, reads and removes blobs. ``{id}:blobs`` holds each one's size, from before its first chunk to after its
    last, so that what a crash leaves is found and swept. Each chunk notes it anew: whoever has the tenant by then may
    have removed what was there, and would not know of the rest that a server writes which wakes too late."""

    def __init__(self, server: Server, keys: Keys) -> None:
        self._server, self._keys = server, keys
        self._guard = threading.Lock()
        self._coming: set[str] = set()

    @staticmethod
    def new_name(version: int, kind: str) -> str:
        return new_name(version, kind)

    def _chunk(self, tenant: str, name: str, number: int) -> str:
        return self._keys.of(tenant, f"blob:{name}:{number}")

    def put(self, tenant: str, name: str, data: bytes) -> BlobRef:
        """Writes a blob that no manifest names yet. Raises StoreFull, StoreFailed, having removed what it wrote.

        The append-only file is in order: what a manifest names is durable when the manifest is.
        """
        view = memoryview(data)
        try:
            for number in range(chunks(len(data))):
                piece = bytes(view[number * CHUNK : (number + 1) * CHUNK])
                self._put_chunk(tenant, name, number, piece, len(data))
        except ServiceError:
            self.discard(tenant, [name])
            raise
        return BlobRef(name, len(data), blob_checksum(data))

    def put_block(self, tenant: str, version: int, data: bytes) -> BlobRef:
        """As ``put``, of a block and under a name of its choice."""
        return self.put(tenant, self.new_name(version, "block"), data)

    def _put_chunk(self, tenant: str, name: str, number: int, piece: bytes, size: int) -> None:
        def write() -> None:
            # at once, so that both are synced at once, and none is there without the other
            pipeline = self._server.client.pipeline(transaction=True)
            pipeline.hset(self._keys.of(tenant, "blobs"), name, size)
            pipeline.set(self._chunk(tenant, name, number), piece)
            pipeline.execute()

        self._server.again("writing a blob", write)

    def share(self, tenant: str, copy: Copy, target: str) -> None:
        """Copies ``tenant``'s blob, on the server, to a new one of ``target``'s. Raises TenantQuarantined, StoreFull,
        StoreFailed."""
        theirs, ours = copy
        for number in range(chunks(ours.size)):
            source, goal = self._chunk(tenant, theirs.name, number), self._chunk(target, ours.name, number)
            if not self._share_chunk(source, goal, self._keys.of(target, "blobs"), ours):
                self.discard(target, [ours.name])
                raise quarantined("a blob is missing", theirs.name)

    def _share_chunk(self, source: str, goal: str, noted: str, ours: BlobRef) -> bool:
        """Whether there was one to copy."""

        def share() -> bool:
            pipeline = self._server.client.pipeline(transaction=True)
            pipeline.hset(noted, ours.name, ours.size)
            pipeline.copy(source, goal, replace=True)
            return bool(pipeline.execute()[-1])

        return self._server.again("copying a blob", share)

    def read(self, tenant: str, blob: BlobRef) -> memoryview:
        """Raises FileNotFoundError, TenantQuarantined, StoreFailed."""
        require_name(blob)
        pieces = []
        for number in range(chunks(blob.size)):
            key = self._chunk(tenant, blob.name, number)
            piece = self._server.again("reading a blob", lambda k=key: self._server.client.get(k))  # type: ignore[misc]
            if piece is None:
                raise FileNotFoundError(blob.name)
            pieces.append(piece)
        data = bytearray().join(pieces)
        if len(data) != blob.size or blob_checksum(memoryview(data), blob.checksum) != blob.checksum:
            raise quarantined("a blob is damaged", blob.name)
        return memoryview(data)

    def expect(self, tenant: str, blobs: Sequence[BlobRef]) -> None:
        """A server has everything at hand."""

    def reader(self, tenant: str, blob: BlobRef) -> Source:
        """Raises TenantQuarantined; reading it FileNotFoundError, StoreFailed."""
        require_name(blob)
        return _Chunks(self._server, lambda number: self._chunk(tenant, blob.name, number), blob)

    def held(self, tenant: str) -> dict[str, int]:
        """Sizes of all blobs that there may be anything of, by name. Raises StoreFailed."""
        key = self._keys.of(tenant, "blobs")
        found = self._server.again("listing blobs", lambda: self._server.client.hgetall(key))
        return {name.decode(): int(size) for name, size in found.items()}

    def remove(self, tenant: str, sizes: dict[str, int]) -> None:
        """Removes blobs of these sizes. Raises StoreFailed."""
        if not sizes:
            return

        def unlink() -> None:
            pipeline = self._server.client.pipeline(transaction=False)
            for name, size in sizes.items():
                pipeline.unlink(*(self._chunk(tenant, name, number) for number in range(chunks(size))))
                pipeline.hdel(self._keys.of(tenant, "blobs"), name)
            pipeline.execute()

        self._server.again("removing blobs", unlink)

    def discard(self, tenant: str, names: list[str]) -> None:
        """As ``remove``, for what is in nobody's way if it stays: it is swept at the tenant's next claim."""
        if not names:
            return
        try:
            held = self.held(tenant)
            self.remove(tenant, {name: held[name] for name in names if name in held})
        except ServiceError:
            return

    @contextmanager
    def coming(self, name: str) -> Iterator[None]:
        """Meanwhile the blob ``name`` is no orphan, though it is written outside the tenant's lock."""
        with self._guard:
            self._coming.add(name)
        try:
            yield
        finally:
            with self._guard:
                self._coming.discard(name)

    def sweep(self, manifest: Manifest) -> None:
        """Removes every blob of the tenant's that its manifest does not name."""
        with self._guard:
            named = {*self._coming, *(ref.name for ref in blobs_of(manifest))}
        try:
            held = self.held(manifest.tenant)
            self.remove(manifest.tenant, {name: size for name, size in held.items() if name not in named})
        except ServiceError:
            return
