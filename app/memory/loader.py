"""Puts a tenant's pool into a slot of the arena, from its warm copy or from the store. In background threads."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor

from app.errors import TenantExists, VersionConflict
from app.memory.arena import Arena, Memory, View
from app.memory.lanes import Lanes, Mark
from app.memory.source import Source
from app.memory.warm import Buffers, Seat, Warm
from app.store.base import Manifest, content

# one in so many of a pool's blocks are published in less time than the whole is projected
_FEW = 10


@dataclass(frozen=True, eq=False)
class Leaving:
    """A pool that is copied to the host while another takes its slot; if there is memory for it, see ``Seat``."""

    memory: Memory
    seat: Seat


@dataclass(frozen=True, eq=False)
class Loaded:
    """``tier`` is where the memory came from, ``moved`` the bytes that went to the device for it."""

    memory: Memory
    tier: str
    moved: int


class Loader:
    """Fills slots that the caller has taken; behind ``after``, all use of what was in them."""

    def __init__(self, arena: Arena, source: Source, lanes: Lanes) -> None:
        self.arena, self.source, self.lanes = arena, source, lanes
        self.backbone = arena.backbone
        self._begun: Buffers | None = None
        if self.backbone.weights.initialized:
            self._begun = self._project_own_pool()
        if arena.form.eight_bit:
            # a block is projected by a kernel of its own. Several threads may be the first to publish one, and Triton
            # does not survive that several are the first to launch a kernel
            c = self.backbone.config
            self.backbone.project(torch.zeros(c.num_layers, c.num_tokens, c.hidden_size))

    # ------------------------------------------------------------ host memory

    @property
    def bytes_per_copy(self) -> int:
        """Host bytes of one warm copy, as they are really taken."""
        return sum(self.lanes.host_bytes(part.nbytes) for part in self._kept(0))

    def buffers(self) -> Buffers:
        """Host memory for one copy."""
        *parts, tail = (self.lanes.host(part.shape, part.dtype) for part in self._kept(0))
        return Buffers(tuple(parts), tail)

    def _kept(self, slot: int) -> list[Tensor]:
        """What a copy keeps of a slot, the tail last."""
        return [*self.arena.pools.parts(slot), self.arena.tails[slot]]

    def _project_own_pool(self) -> Buffers:
        """What every tenant begins with, ready to be copied."""
        hidden = self.source.own_pool.hidden
        self.arena.project(0, hidden)
        buffers = self.buffers()
        for host, part in zip(buffers.parts, self.arena.pools.parts(0), strict=True):
            host.copy_(part)
        buffers.tail.copy_(hidden[:, -self.backbone.config.num_tokens :])
        return buffers

    # ------------------------------------------------------------ one load

    def load(self, tenant: str, slot: int, after: Mark, warm: Warm | None, leaving: Leaving | None) -> Loaded:
        """Copies ``leaving`` out of the slot and brings the tenant's newest version in.

        ``warm`` is used if it is that version. Raises FingerprintMismatch, and as Store.claim, create and read;
        then ``leaving`` may not have been copied.
        """
        manifest = self._manifest(tenant)
        out = [] if leaving is None else self._out(leaving)
        if warm is not None and warm.content == content(manifest):
            buffers, rank, born, tier = warm.seat.buffers, warm.rank, warm.born, "warm"
        elif manifest.version == 0 and self._begun is not None:
            buffers, rank, born, tier = (
                self._begun,
                self.arena.first_rank(),
                self.source.own_pool.born,
                "cold",
            )
        else:
            # first, because requests for the one that leaves wait for its copy
            self.lanes.exchange(after, out, [])
            return self._regrown(manifest, slot, after) or self._from_store(manifest, slot, after)
        tail = self.arena.tails[slot]
        back = [*self._pairs(slot, buffers), (tail, buffers.tail)]
        self.lanes.exchange(after, out, back)
        return Loaded(self._memory(manifest, slot, rank, born, tail), tier, sum(t.nbytes for t, _ in back))

    def _pairs(self, slot: int, buffers: Buffers) -> list[tuple[Tensor, Tensor]]:
        """(in the slot, on the host), layer by layer."""
        layers = range(self.backbone.config.num_layers)
        both = list(zip(self.arena.pools.parts(slot), buffers.parts, strict=True))
        return [(device[layer], host[layer]) for layer in layers for device, host in both]

    def _out(self, leaving: Leaving) -> list[tuple[Tensor, Tensor]]:
        memory = leaving.memory
        try:
            buffers = leaving.seat.buffers
        except (RuntimeError, MemoryError):
            # it is not kept then, which is no reason to fail the one that comes
            return []
        assert memory.tail is not None
        pairs = [(host, device) for device, host in self._pairs(memory.slot, buffers)]
        return [*pairs, (buffers.tail, memory.tail)]

    def _manifest(self, tenant: str) -> Manifest:
        manifest = self.source.store.claim(tenant)
        if manifest is None:
            try:
                manifest = self.source.create(tenant, None)
            except TenantExists:
                manifest = self.source.store.claim(tenant)
                assert manifest is not None
        self.source.check(manifest)
        return manifest

    def _regrown(self, manifest: Manifest, slot: int, after: Mark) -> Loaded | None:
        """What few blocks made of the checkpoint's own pool: that lies here projected, and they are published in it.

        None if it is to be had in no such way.
        """
        begun, few = self._begun, max(1, self.backbone.config.num_blocks // _FEW)
        if begun is None or manifest.snapshot is not None or not 0 < len(manifest.blocks) <= few:
            return None
        try:
            blocks = [block for _, block in self.source.blocks(manifest)]
        except VersionConflict:
            # compaction has taken one away
            return None
        if any(block.forgotten is None or block.hidden.shape != begun.tail.shape for block in blocks):
            return None
        pairs = self._pairs(slot, begun)
        self.lanes.exchange(after, [], pairs)
        own = msgspec.structs.replace(manifest, version=0)
        memory = self._memory(own, slot, self.arena.first_rank(), self.source.own_pool.born, begun.tail)
        with self.lanes.apart(after):
            for block in blocks:
                self.arena.publish(memory, block.hidden, block.forgotten)
        assert memory.version == manifest.version
        return Loaded(memory, "cold", sum(target.nbytes for target, _ in pairs))

    def _from_store(self, manifest: Manifest, slot: int, after: Mark) -> Loaded:
        config = self.backbone.config
        if manifest.version == 0:
            empty = torch.full((config.num_layers, config.pool_slots), -1, dtype=torch.int32)
            return Loaded(self._memory(manifest, slot, empty, self.source.own_pool.born, None), "cold", 0)
        manifest, pool = self.source.settled_pool(manifest)
        with self.lanes.apart(after):
            rank = self.arena.project(slot, pool.hidden, self.lanes.bring)
            tail = self.arena.tails[slot].copy_(pool.hidden[:, -config.num_tokens :])
        moved = config.num_layers * config.pool_size * config.hidden_size * self.backbone.dtype.itemsize
        return Loaded(self._memory(manifest, slot, rank, pool.born, tail), "cold", moved)

    def _memory(
        self, manifest: Manifest, slot: int, rank: Tensor, born: Tensor, tail: Tensor | None
    ) -> Memory:
        version = manifest.version
        view = View(version, rank, empty=tail is None)
        return Memory(
            manifest.tenant,
            manifest.seed,
            slot,
            version,
            tail,
            born,
            view,
            lineage=manifest.lineage,
            created=manifest.created,
        )
