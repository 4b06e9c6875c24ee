"""The memory's operations as Triton kernels, for GPUs.

All that a decode step launches lies at fixed addresses, so that it can be captured in a CUDA graph: the work
list is rewritten on the host and copied, contexts' tables stay on the device from a sequence's first step on.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from app.model.batch import ContextCache, Reading
from app.model.config import ModelConfig
from app.model.operations import Sizes
from app.model.pools import PoolForm, Pools
from app.model.rope import RopeTable
from kernels.add_norm import add_norm
from kernels.hot_copy import write_hot_copy
from kernels.memory_attention import (
    Rotation,
    Scratch,
    decode_tile_rows,
    memory_attention,
    prompt_tile_rows,
    tuning,
)
from kernels.plan import Plan, PlanShape
from kernels.rotate_rows import write_rotated_rows
from kernels.support import unsupported
from kernels.swiglu import write_swiglu
from kernels.write_block import spare_slots, write_block


class Unsupported(ValueError):
    """This device or model is not for the kernels; the message says why."""


class KernelOperations:
    """See ``app.model.operations.Operations``. Raises Unsupported.

    ``rotating``: keys are turned as they are read, in place of rotated copies; 8-bit pools need it.
    """

    def __init__(
        self,
        config: ModelConfig,
        rope: RopeTable,
        dtype: torch.dtype,
        device: torch.device,
        *,
        sizes: Sizes,
        rotating: bool = False,
        eight_bit: bool = False,
    ) -> None:
        rotating = rotating or eight_bit
        reason = unsupported(device, dtype, config.head_dim, rotating=rotating)
        if reason is not None:
            raise Unsupported(reason)
        self.form = PoolForm(copies=not rotating, eight_bit=eight_bit)
        self._config, self._rope, self._dtype, self._device = config, rope, dtype, device
        self.sizes = sizes
        self._tables = _Tables(sizes, device)
        self._lists: dict[tuple[bool, int], _List] = {}

    # ------------------------------------------------------------ between the products

    def add_norm(self, x: Tensor, delta: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
        return add_norm(x, delta, weight, self._config.rms_norm_eps)

    def place(
        self,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        write_rows: Tensor,
        cache_key: Tensor,
        cache_value: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return write_rotated_rows(qkv, cos, sin, write_rows, cache_key, cache_value)

    def gate(self, gate_up: Tensor) -> Tensor:
        return write_swiglu(gate_up)

    # ------------------------------------------------------------ reading

    def prepare(self, readings: list[Reading], decode: int) -> KernelReads:
        """See Operations. What was prepared before is overwritten: the last step must have been waited for."""
        lists = []
        for prompts, part in ((False, readings[:decode]), (True, readings[decode:])):
            if part:
                chosen = self._list(prompts, part)
                chosen.fill(part, self._tables, self._config.pool_slots)
                rows = slice(part[0].rows.start, part[-1].rows.stop)
                lists.append((rows, chosen))
        return KernelReads(self, lists, self._tables.device_table)

    def list_key(self, readings: list[Reading]) -> int:
        """The tile rows that decoding ``readings`` take: a captured graph is good for one value of it."""
        # a copy is one pool's
        sharing = max(Counter([r.hot for r in readings if r.hot is not None]).values(), default=1)
        return decode_tile_rows(self._config.group_size, sharing)

    @property
    def prompt_key(self) -> int:
        """As ``list_key``, for a prompt."""
        c = self._config
        return prompt_tile_rows(c.group_size, c.head_dim, self._dtype, rotated=self.form.copies)

    def _list(self, prompts: bool, readings: list[Reading]) -> _List:
        tile_rows = self.prompt_key if prompts else self.list_key(readings)
        if (prompts, tile_rows) not in self._lists:
            self._lists[prompts, tile_rows] = self._new_list(prompts, tile_rows)
        return self._lists[prompts, tile_rows]

    def _new_list(self, prompts: bool, tile_rows: int) -> _List:
        c, sizes = self._config, self.sizes
        rows = sizes.rows if prompts else sizes.sequences
        tuned = tuning(
            c.head_dim,
            self._dtype,
            tile_rows,
            rotated=self.form.copies,
            eight_bit=self.form.eight_bit,
        )
        workers = tuned.workers(c.num_kv_heads, self._device)
        shape = PlanShape(rows, workers, tile_rows, c.group_size, tuned.step, sizes.sequences)
        return _List(shape, Scratch.allocate(shape, c.num_kv_heads, c.head_dim, self._device), self._device)

    def rotation(self, layer: int, pools: Pools) -> Rotation | None:
        """How the keys of ``layer`` are turned as they are read; None where copies are read."""
        if pools.rank is None:
            return None
        return Rotation(
            pools.rank[layer],
            self._rope.cos,
            self._rope.sin,
            self._config.first_rank_position,
            None if pools.key_scale is None else pools.key_scale[layer],
            None if pools.value_scale is None else pools.value_scale[layer],
        )

    def attend_causally(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows, keys = query.shape[1], key.shape[2]
        group = self._config.group_size
        output = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.repeat_interleave(group, 1),
            value.repeat_interleave(group, 1),
            attn_mask=causal_lower_right(rows, keys),
        )
        return output.transpose(1, 2).reshape(query.shape[0], rows, -1)

    # ------------------------------------------------------------ writing

    def make_readable(self, pools: Pools, slot: int, rank: Tensor, hot: int) -> None:
        ranks = rank.to(self._device)
        if pools.rank is not None:
            pools.rank[:, hot] = ranks
            return
        assert pools.hot_key is not None
        assert pools.bias is not None
        rope, first = self._rope, self._config.first_rank_position
        write_hot_copy(pools.key[:, slot], ranks, rope.cos, rope.sin, first, pools.hot_key[:, hot])
        pools.bias[:, hot] = torch.zeros(ranks.shape, dtype=self._dtype, device=self._device).masked_fill_(
            ranks < 0, -torch.inf
        )

    def prepare_slots(self, slots: Tensor, pool_slots: int) -> Tensor:
        """See Operations. Raises BadKernelInput: a wrong slot may be another tenant's."""
        rows = spare_slots(slots.reshape(-1, slots.shape[-1]), pool_slots, self._device)
        return rows.view(slots.shape)

    def write(
        self,
        hidden: Tensor,
        norm: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        slots: Tensor,
        key: Tensor,
        value: Tensor,
    ) -> None:
        eps = self._config.rms_norm_eps
        write_block(hidden.contiguous(), norm, eps, weight, bias, slots, key, value)

    def write_blocks(
        self,
        hidden: Tensor,
        norm: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        pools: list[int],
        slots: Tensor,
        key: Tensor,
        value: Tensor,
    ) -> None:
        for block, pool, at in zip(hidden, pools, slots, strict=True):
            self.write(block, norm, weight, bias, at, key[pool], value[pool])


@dataclass(frozen=True)
class KernelReads:
    """See ``app.model.operations.Attend``: work lists with the rows they are for."""

    operations: KernelOperations
    lists: list[tuple[slice, _List]]
    table: Tensor

    def padded(self, rows: int) -> KernelReads:
        """The same for decoding rows alone, or a prompt alone, rounded up to ``rows``; those more read nothing."""
        ((_, work),) = self.lists
        return replace(self, lists=[(slice(0, rows), work)])

    def __call__(self, layer: int, query: Tensor, pools: Pools, cache: ContextCache, out: Tensor) -> None:
        rotation = self.operations.rotation(layer, pools)
        key = pools.key if pools.hot_key is None else pools.hot_key
        for rows, work in self.lists:
            memory_attention(
                query[rows],
                key[layer],
                pools.value[layer],
                None if pools.bias is None else pools.bias[layer],
                cache.key[layer],
                cache.value[layer],
                self.table,
                work.plan,
                work.scratch,
                out[rows].view(query[rows].shape),
                rotation=rotation,
            )


class _List:
    """A work list on the device, and the host's own that it is copied from."""

    def __init__(self, shape: PlanShape, scratch: Scratch, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self.scratch = scratch
        self._host = Plan.allocate(shape, "cpu", pinned=cuda)
        self.plan = Plan.allocate(shape, device) if cuda else self._host
        self._copied = torch.cuda.Event() if cuda else None  # type: ignore[no-untyped-call]

    def fill(self, readings: list[Reading], tables: _Tables, pool_slots: int) -> None:
        if self._copied is not None:
            # the copy of the step before reads what is rewritten here
            self._copied.synchronize()
        hot = [-1 if reading.hot is None else reading.hot for reading in readings]
        slot = [-1 if reading.slot is None else reading.slot for reading in readings]
        owner, limit = tables.place(readings), [reading.seen for reading in readings]
        if readings[-1].rows.stop - readings[0].rows.start > len(readings):
            # not one row each
            counts = [reading.rows.stop - reading.rows.start for reading in readings]
            hot, slot, owner = (
                [value for value, count in zip(each, counts, strict=True) for _ in range(count)]
                for each in (hot, slot, owner)
            )
            limit = [
                seen
                for last, count in zip(limit, counts, strict=True)
                for seen in range(last - count + 1, last + 1)
            ]
        most = 2**31 - 1
        self._host.fill(
            hot,
            slot,
            owner,
            limit,
            pool_slots=pool_slots,
            pools=(most, most),
            tables=(tables.device_table.shape[0], tables.device_table.shape[1]),
        )
        if self._copied is not None:
            self.plan.copy_(self._host)
            self._copied.record()


class _Tables:
    """The contexts' cache rows on the device: int32 [sequences, context], a row a sequence.

    A sequence keeps its row as long as nobody needs it more; it is written when the sequence is first met.
    """

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        self.device_table = torch.zeros(sizes.sequences, sizes.context, dtype=torch.int32, device=device)
        # by identity: the same tensor stands for the same sequence, and is held here so that no other can take its id
        self._held: OrderedDict[int, tuple[int, Tensor]] = OrderedDict()

    def place(self, readings: list[Reading]) -> list[int]:
        """The table rows of ``readings``, of which there are at most as many as sequences run at once."""
        rows = []
        for reading in readings:
            table = reading.table
            found = self._held.pop(id(table), None)
            if found is None:
                row = len(self._held)
                if row >= self.device_table.shape[0]:
                    _, (row, _) = self._held.popitem(last=False)
                self.device_table[row, : len(table)] = table.to(self.device_table.device, torch.int32)
                found = row, table
            self._held[id(table)] = found
            rows.append(found[0])
        return rows
