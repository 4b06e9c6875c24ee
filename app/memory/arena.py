"""Tenants' pools in device memory: slots, rank vectors, versions, and the rotated copies their readers use.

A self-update's block goes into the pool's K spare slots and a new rank vector is published; the slots it
makes spare are written again only when the last reader of the version before has gone. Nothing moves.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from app.memory.sample import sampled_blocks
from app.model.backbone import Backbone
from app.model.forgetting import Change, change
from app.model.pools import Pools
from kernels.quantise import key_scale


class Misplaced(AssertionError):
    """A slot or a rotated copy is not, or no longer, that of the memory which is about to be read or written."""


@dataclass(eq=False)
class View:
    """One version of one tenant's pool, as generations read it: ``rank`` int32 [L, N + K], -1 for spare.

    ``hot`` is its rotated copy (None: not built). ``readers`` are the generations that hold it. ``empty``: of a memory
    that was not initialised, of which there is no copy to read.
    """

    version: int
    rank: Tensor
    hot: int | None = None
    readers: int = 0
    used: int = 0
    empty: bool = False


@dataclass(eq=False)
class Memory:
    """A resident tenant: its pool's ``slot``, newest version and tail, and the views that are being read.

    ``tail`` [L, K, d] is the newest block's hidden states, the slot's own in ``Arena.tails``; None while the memory is
    not initialised.
    ``born`` int32 [L or 1, N] is the version that wrote each rank. ``pins`` counts who needs it to stay.
    ``created`` and ``lineage`` are the manifest's; with the version they name one content. ``owed``: it was brought
    for a request that has not begun.
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
    created: float = 0.0
    owed: bool = False

    @property
    def content(self) -> tuple[float, int, int]:
        """See ``app.store.base.content``."""
        return self.created, self.lineage, self.version

    @property
    def initialized(self) -> bool:
        return self.tail is not None


class Arena:
    """Owns the device memory for pools. Lowest free index first, so that running pools lie side by side.

    ``tails`` [slots, L, K, d] are the hidden states of the newest block of each slot's memory.

    Slots and copies have owners, beside what memories and views say of themselves: ``check`` compares the two.
    """

    def __init__(self, backbone: Backbone, slots: int, hot: int) -> None:
        self.backbone = backbone
        self.form = backbone.operations.form
        # 8-bit keys need to know their channels' sizes, which the checkpoint's own pool shows; where that repeats one
        # block, it shows less than there is
        scale = None
        if self.form.eight_bit:
            layers = backbone.project_by_layer(backbone.weights.memory)
            scale = torch.cat([key_scale(key) for _, key, _ in layers])
        self.pools = Pools.allocate(
            backbone.config, slots, hot, backbone.dtype, backbone.device, self.form, scale
        )
        if self.pools.key_scale is not None:
            for blocks in sampled_blocks(backbone, self.pools):
                key, _ = backbone.project(blocks)
                torch.maximum(self.pools.key_scale, key_scale(key), out=self.pools.key_scale)
        c = backbone.config
        self.tails = torch.empty(
            (slots, c.num_layers, c.num_tokens, c.hidden_size), dtype=backbone.dtype, device=backbone.device
        )
        self.slots = slots
        self._free_slots = list(range(slots))
        self._hot = hot
        self._free_hot = list(range(hot))
        self._used_slots: set[int] = set()
        self._used_hot: set[int] = set()
        self._idle: dict[int, tuple[Memory, View]] = {}
        self._slot_owners: list[Memory | None] = [None] * slots
        self._hot_owners: list[View | None] = [None] * hot
        self._clock = 0

    @staticmethod
    def bytes_per_copy(backbone: Backbone) -> int:
        """Device bytes of one version of a pool that can be read."""
        return backbone.operations.form.copy_bytes(backbone.config, backbone.dtype)

    @staticmethod
    def bytes_per_pool(backbone: Backbone) -> int:
        """Device bytes of one resident tenant, its copies apart: the pool and the tail."""
        form, c = backbone.operations.form, backbone.config
        tail = c.num_layers * c.num_tokens * c.hidden_size * backbone.dtype.itemsize
        return form.pool_bytes(c, backbone.dtype) + tail

    def take_slot(self) -> int | None:
        return heapq.heappop(self._free_slots) if self._free_slots else None

    def settle(self, memory: Memory) -> None:
        """The slot that was taken for it, and has been filled, is the memory's own from here on."""
        self._slot_owners[memory.slot] = memory

    def give_slot(self, slot: int) -> None:
        self._slot_owners[slot] = None
        self._used_slots.add(slot)
        heapq.heappush(self._free_slots, slot)

    def give_hot(self, hot: int) -> None:
        """Frees a copy that no view has."""
        self._hot_owners[hot] = None
        self._used_hot.add(hot)
        heapq.heappush(self._free_hot, hot)

    def check(self, memory: Memory, view: View | None = None) -> None:
        """That the slot is the memory's, and for a reader that the copy is the view's.

        Raises Misplaced. The names of its owners are not in the message, which is logged.
        """
        if self._slot_owners[memory.slot] is not memory:
            raise Misplaced(f"slot {memory.slot} is not that of the memory which needs it")
        if view is None or (view.empty and view.hot is None):
            return
        if view.hot is None or self._hot_owners[view.hot] is not view:
            raise Misplaced(f"rotated copy {view.hot} is not that of the version which is read")

    # ------------------------------------------------------------ wiping what is free

    def take_used(self) -> tuple[list[int], list[int]]:
        """Takes the free slots and copies that somebody's memory was in out of use, until ``give_wiped``."""
        slots = [slot for slot in self._free_slots if slot in self._used_slots]
        copies = [hot for hot in self._free_hot if hot in self._used_hot]
        self._free_slots = sorted(set(self._free_slots) - set(slots))
        self._free_hot = sorted(set(self._free_hot) - set(copies))
        return slots, copies

    def wipe(self, slots: list[int], copies: list[int]) -> None:
        """Overwrites them. Safe beside other steps."""
        for slot in slots:
            for part in (*self.pools.parts(slot), self.tails[slot]):
                part.zero_()
        for hot in copies:
            for part in self.pools.copy_parts(hot):
                part.zero_()

    def give_wiped(self, slots: list[int], copies: list[int]) -> None:
        for slot in slots:
            heapq.heappush(self._free_slots, slot)
        for hot in copies:
            heapq.heappush(self._free_hot, hot)
        self._used_slots.difference_update(slots)
        self._used_hot.difference_update(copies)

    # ------------------------------------------------------------ filling a slot

    def project(self, slot: int, hidden: Tensor, bring: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Puts the pool of hidden states [L, N, d] (on the host) into ``slot``; returns its rank vector.

        Beside the slot it takes the device memory of one layer. ``bring`` as in ``Backbone.write_memory``.
        """
        self._open(slot)
        if self.form.eight_bit:
            self._put_by_layer(slot, hidden, bring)
            return self.first_rank()
        ranks = torch.arange(hidden.shape[1]).expand(hidden.shape[:2])
        pools = self.pools
        self.backbone.write_memory(hidden, ranks, pools.key[:, slot], pools.value[:, slot], bring)
        return self.first_rank()

    def _put_by_layer(
        self, slot: int, hidden: Tensor, bring: Callable[[Tensor], Tensor] | None = None, repeats: int = 1
    ) -> None:
        """Projects hidden memory [L, T, d] and puts it into the first ``repeats`` * T ranks of an open slot."""
        ranks = slice(0, repeats * hidden.shape[1])
        for layer, key, value in self.backbone.project_by_layer(hidden, bring):
            if repeats > 1:
                key, value = (part.repeat(1, 1, repeats, 1) for part in (key, value))
            self.pools.put(slot, ranks, key, value, layer)

    def _open(self, slot: int) -> None:
        """Readies a slot to be filled in rank order."""
        self.pools.open(slot, self.backbone.config.pool_size)

    def first_rank(self) -> Tensor:
        """The rank vector of a slot that was filled in rank order."""
        config = self.backbone.config
        rank = torch.full((config.num_layers, config.pool_slots), -1, dtype=torch.int32)
        rank[:, : config.pool_size] = torch.arange(config.pool_size, dtype=torch.int32)
        return rank

    # ------------------------------------------------------------ readers

    @property
    def hot_used(self) -> int:
        """Rotated copies that are built or being built."""
        return self._hot - len(self._free_hot)

    @property
    def copies_free(self) -> bool:
        return bool(self._free_hot)

    def take_hot(self, kept: Callable[[Memory], bool] = lambda _: False) -> int | None:
        """Room for a rotated copy: a free one, else the least recently used that nobody reads, else None.

        Those of memories that are ``kept`` stay.
        """
        if self._free_hot:
            return heapq.heappop(self._free_hot)
        idle = [(view.used, hot, view) for hot, (memory, view) in self._idle.items() if not kept(memory)]
        if not idle:
            return None
        _, hot, view = min(idle, key=lambda item: item[0])
        del self._idle[hot]
        view.hot = self._hot_owners[hot] = None
        return hot

    def build_hot(self, slot: int, rank: Tensor, hot: int) -> None:
        """Makes the pool in ``slot`` readable by ``rank`` [L, N + K] as copy ``hot``. Safe beside other steps."""
        self.backbone.operations.make_readable(self.pools, slot, rank, hot)

    def settle_hot(self, memory: Memory, view: View, hot: int) -> None:
        """Gives the finished copy to its view, or frees it if the view has been replaced meanwhile."""
        if memory.view is not view:
            self.give_hot(hot)
            return
        view.hot = hot
        self._hot_owners[hot] = view
        self._idle[hot] = memory, view

    def readable(self, memory: Memory) -> bool:
        return memory.view.hot is not None or not memory.initialized

    def touch(self, memory: Memory) -> None:
        """Notes that the memory is in use now."""
        self._clock += 1
        memory.view.used = memory.used = self._clock

    def read(self, memory: Memory) -> View:
        """The newest view, held for a reader until ``release``."""
        view = memory.view
        view.readers += 1
        memory.pins += 1
        self.touch(memory)
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
            self._idle[view.hot] = memory, view

    def _cool(self, view: View) -> None:
        if view.hot is not None:
            self._idle.pop(view.hot, None)
            self.give_hot(view.hot)
            view.hot = None

    # ------------------------------------------------------------ updates

    def publishable(self, memory: Memory) -> bool:
        """Whether nobody reads the version before any more, whose forgotten slots the next block takes."""
        return not memory.older

    def publish(self, memory: Memory, hidden: Tensor, forgotten: Tensor | None) -> None:
        """Makes the committed block [L, K, d] the memory's next version. The caller checks ``publishable``.

        ``forgotten`` int64 [L or 1, K], or None for the block that fills a memory for the first time.
        """
        made = None
        if forgotten is not None:
            made = change(memory.view.rank, memory.born, forgotten, memory.version + 1)
        self.publish_all([(memory, hidden, made)])

    def publish_all(self, blocks: list[tuple[Memory, Tensor, Change | None]]) -> None:
        """As ``publish``, of several memories, each named once, with what becomes of their ranks worked out: what is
        alike of theirs is done to all at once."""
        grown = []
        for memory, hidden, made in blocks:
            if made is None:
                self._fill_first(memory, hidden)
            else:
                assert made.version == memory.version + 1
                grown.append((memory, hidden, made))
        if grown:
            self._publish_grown(*zip(*grown, strict=True))

    def _fill_first(self, memory: Memory, hidden: Tensor) -> None:
        self._open(memory.slot)
        self._put_by_layer(memory.slot, hidden, repeats=self.backbone.config.num_blocks)
        self._renew(memory, hidden, self.first_rank(), torch.full_like(memory.born, memory.version + 1))

    def _publish_grown(
        self, memories: tuple[Memory, ...], hidden: tuple[Tensor, ...], changes: tuple[Change, ...]
    ) -> None:
        slots = torch.stack([made.slots for made in changes])
        self._write([memory.slot for memory in memories], hidden, slots)
        for memory, block, made in zip(memories, hidden, changes, strict=True):
            self._renew(memory, block, made.rank, made.born)

    def _renew(self, memory: Memory, hidden: Tensor, rank: Tensor, born: Tensor) -> None:
        old = memory.view
        if old.readers:
            memory.older.append(old)
        else:
            self._cool(old)
        memory.version += 1
        memory.view, memory.born = View(memory.version, rank, used=old.used), born
        memory.tail = self.tails[memory.slot].copy_(hidden)

    def _write(self, pools: list[int], hidden: tuple[Tensor, ...], slots: Tensor) -> None:
        """Projects a block [L, K, d] each into ``slots`` [B, L, K] of ``pools``."""
        if self.form.eight_bit:
            for pool, block, at in zip(pools, hidden, slots, strict=True):
                self.pools.put(pool, at, *self.backbone.project(block))
        else:
            self.backbone.write_blocks(hidden, pools, slots, self.pools.key, self.pools.value)

    # ------------------------------------------------------------ leaving

    def evict(self, memory: Memory) -> None:
        """Frees slot and rotated copies of a memory that nobody reads."""
        assert memory.pins == 0
        assert not memory.older
        self._cool(memory.view)
        self.give_slot(memory.slot)
