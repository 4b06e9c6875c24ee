"""Tenants' pools in device memory: slots, rank vectors, versions, and the rotated copies their readers use.

A self-update's block goes into the pool's K spare slots and a new rank vector is published; the slots it
makes spare are written again only when the last reader of the version before has gone. Nothing moves.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

import torch
from torch import Tensor

from app.model.backbone import Backbone
from app.model.forgetting import renumber
from app.model.pools import Pools
from kernels.quantise import key_scale


@dataclass(eq=False)
class View:
    """One version of one tenant's pool, as generations read it: ``rank`` int32 [L, N + K], -1 for spare.

    ``hot`` is its rotated copy (None: not built). ``readers`` are the generations that hold it.
    """

    version: int
    rank: Tensor
    hot: int | None = None
    readers: int = 0
    used: int = 0


@dataclass(eq=False)
class Memory:
    """A resident tenant: its pool's ``slot``, newest version and tail, and the views that are being read.

    ``tail`` [L, K, d] is the newest block's hidden states, None while the memory is not initialised.
    ``born`` int32 [L or 1, N] is the version that wrote each rank. ``pins`` counts who needs it to stay.
    ``lineage`` counts the store's rollbacks and rebuilds: with the version it names one content.
    """

    tenant: str
    seed: int
    slot: int
    version: int
    tail: Tensor | None
    born: Tensor
    view: View
    older: list[View] = field(default_factory=list)
    pins: int = 0
    used: int = 0
    lineage: int = 0

    @property
    def initialized(self) -> bool:
        return self.tail is not None


class Arena:
    """Owns the device memory for pools. Lowest free index first, so that running pools lie side by side."""

    def __init__(self, backbone: Backbone, slots: int, hot: int) -> None:
        self.backbone = backbone
        self.form = backbone.operations.form
        # 8-bit keys need to know their channels' sizes, which the checkpoint's own pool shows
        scale = key_scale(backbone.project(backbone.weights.memory)[0]) if self.form.eight_bit else None
        self.pools = Pools.allocate(
            backbone.config, slots, hot, backbone.dtype, backbone.device, self.form, scale
        )
        self.slots = slots
        self._free_slots = list(range(slots))
        self._free_hot = list(range(hot))
        self._idle: dict[int, View] = {}
        self._clock = 0

    @staticmethod
    def bytes_per_pool(backbone: Backbone) -> int:
        """Device bytes of one resident tenant: its pool, and one version of it that can be read."""
        form, c = backbone.operations.form, backbone.config
        return form.pool_bytes(c, backbone.dtype) + form.copy_bytes(c, backbone.dtype)

    def take_slot(self) -> int | None:
        return heapq.heappop(self._free_slots) if self._free_slots else None

    def give_slot(self, slot: int) -> None:
        heapq.heappush(self._free_slots, slot)

    # ------------------------------------------------------------ filling a slot

    def fill(self, slot: int, key: Tensor, value: Tensor) -> Tensor:
        """Puts a pool in rank order, K and V [L, H_kv, N, d_head], into ``slot``; returns its rank vector."""
        config = self.backbone.config
        size = config.pool_size
        # spare slots are read with weight zero: they must be finite
        for part in self.pools.parts(slot):
            part[:, :, size:] = 0
        self.pools.put(slot, slice(0, size), key, value)
        rank = torch.full((config.num_layers, config.pool_slots), -1, dtype=torch.int32)
        rank[:, :size] = torch.arange(size, dtype=torch.int32)
        return rank

    # ------------------------------------------------------------ readers

    def take_hot(self) -> int | None:
        """Room for a rotated copy: a free one, else the least recently used that nobody reads, else None."""
        if self._free_hot:
            return heapq.heappop(self._free_hot)
        if not self._idle:
            return None
        hot, view = min(self._idle.items(), key=lambda item: item[1].used)
        del self._idle[hot]
        view.hot = None
        return hot

    def build_hot(self, slot: int, rank: Tensor, hot: int) -> None:
        """Makes the pool in ``slot`` readable by ``rank`` [L, N + K] as copy ``hot``. Safe beside other steps."""
        self.backbone.operations.make_readable(self.pools, slot, rank, hot)

    def settle_hot(self, memory: Memory, view: View, hot: int) -> None:
        """Gives the finished copy to its view, or frees it if the view has been replaced meanwhile."""
        if memory.view is not view:
            heapq.heappush(self._free_hot, hot)
            return
        view.hot = hot
        self._idle[hot] = view

    def readable(self, memory: Memory) -> bool:
        return memory.view.hot is not None or not memory.initialized

    def read(self, memory: Memory) -> View:
        """The newest view, held for a reader until ``release``."""
        view = memory.view
        view.readers += 1
        memory.pins += 1
        self._clock += 1
        view.used = memory.used = self._clock
        if view.hot is not None:
            self._idle.pop(view.hot, None)
        return view

    def release(self, memory: Memory, view: View) -> None:
        view.readers -= 1
        memory.pins -= 1
        if view.readers:
            return
        if view is not memory.view:
            memory.older.remove(view)
            self._cool(view)
        elif view.hot is not None:
            self._idle[view.hot] = view

    def _cool(self, view: View) -> None:
        if view.hot is not None:
            self._idle.pop(view.hot, None)
            heapq.heappush(self._free_hot, view.hot)
            view.hot = None

    # ------------------------------------------------------------ updates

    def publishable(self, memory: Memory) -> bool:
        """Whether nobody reads the version before any more, whose forgotten slots the next block takes."""
        return not memory.older

    def publish(self, memory: Memory, hidden: Tensor, forgotten: Tensor | None) -> None:
        """Makes the committed block [L, K, d] the memory's next version. The caller checks ``publishable``.

        ``forgotten`` int64 [L or 1, K], or None for the block that fills a memory for the first time.
        """
        config = self.backbone.config
        version = memory.version + 1
        if forgotten is None:
            key, value = self.backbone.project(hidden)
            repeats = (1, 1, config.num_blocks, 1)
            rank = self.fill(memory.slot, key.repeat(repeats), value.repeat(repeats))
            born = torch.full_like(memory.born, version)
        else:
            rank, slots = renumber(memory.view.rank, forgotten)
            self._write(memory.slot, hidden, slots)
            keep = torch.ones(memory.born.shape, dtype=torch.bool).scatter_(1, forgotten, False)
            kept = memory.born[keep].view(memory.born.shape[0], -1)
            fresh = torch.full((kept.shape[0], config.num_tokens), version, dtype=kept.dtype)
            born = torch.cat([kept, fresh], dim=1)
        old = memory.view
        if old.readers:
            memory.older.append(old)
        else:
            self._cool(old)
        memory.view = View(version, rank, used=old.used)
        memory.version, memory.born = version, born
        memory.tail = hidden.to(self.backbone.device, self.backbone.dtype)

    def _write(self, slot: int, hidden: Tensor, slots: Tensor) -> None:
        """Projects a block [L, K, d] into ``slots`` [L, K] of a pool."""
        if self.form.eight_bit:
            self.pools.put(slot, slots, *self.backbone.project(hidden))
        else:
            self.backbone.write_memory(hidden, slots, self.pools.key[:, slot], self.pools.value[:, slot])

    # ------------------------------------------------------------ leaving

    def evict(self, memory: Memory) -> None:
        """Frees slot and rotated copies of a memory that nobody reads."""
        assert memory.pins == 0
        assert not memory.older
        self._cool(memory.view)
        self.give_slot(memory.slot)
