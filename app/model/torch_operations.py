"""The memory's operations in torch: the form for CPUs, and the definition of what the kernels compute.

Decoding rows that read neighbouring pools become one batched product, and so do contexts of similar length.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from app.model.batch import ContextCache, Reading
from app.model.config import ModelConfig
from app.model.pools import PoolForm, Pools
from app.model.rope import RopeTable
from kernels.attention import merge, pack_heads, partial_attention, unpack_heads
from kernels.rotate import rotate_pool
from kernels.update_write import project_memory

_SHORTEST_BUCKET = 64


@dataclass(frozen=True)
class _PoolRun:
    """Decode rows that read neighbouring pools, the same number of rows each: one batched product."""

    rows: slice
    hot: slice
    slots: slice

    @property
    def pools(self) -> int:
        return int(self.hot.stop - self.hot.start)


@dataclass(frozen=True)
class _Bucket:
    """Decode rows of similar context length. ``table`` [B, C] cache rows, ``bias`` [B, 1, 1, C]."""

    rows: Tensor | slice
    table: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class _Span:
    """A chunk of a prompt. ``table`` [C] cache rows, its own last; ``bias`` [1, 1, G * n, C]."""

    rows: slice
    hot: int | None
    slot: int | None
    table: Tensor
    bias: Tensor | None


class TorchOperations:
    """See ``app.model.operations.Operations``."""

    def __init__(
        self,
        config: ModelConfig,
        rope: RopeTable,
        dtype: torch.dtype,
        device: torch.device,
        *,
        eight_bit: bool = False,
    ) -> None:
        # torch cannot attend to 8-bit tensors: what is being read is copied whole
        self.form = PoolForm(eight_bit=eight_bit, value_copies=eight_bit)
        self._config, self._rope, self._dtype, self._device = config, rope, dtype, device

    def prepare(self, readings: list[Reading], decode: int) -> _Reads:
        single = readings[:decode]
        return _Reads(
            self._config,
            decode,
            _pool_runs(single),
            self._buckets(single),
            [self._span(reading) for reading in readings[decode:]],
        )

    def attend_causally(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows = query.shape[0]
        output, _ = partial_attention(
            pack_heads(query[None], self._config.num_kv_heads),
            key[None],
            value[None],
            self._causal_bias(rows, key.shape[1]),
        )
        return unpack_heads(output, rows)[0]

    def make_readable(self, pools: Pools, slot: int, rank: Tensor, hot: int) -> None:
        assert pools.hot_key is not None
        assert pools.bias is not None
        key, value = pools.whole(slot, self._dtype)
        rope, first = self._rope, self._config.first_rank_position
        rotate_pool(key, rank, rope.cos, rope.sin, first, pools.hot_key[:, hot])
        if pools.hot_value is not None:
            pools.hot_value[:, hot] = value
        hidden = torch.zeros(rank.shape, dtype=self._dtype).masked_fill_(rank < 0, -torch.inf)
        pools.bias[:, hot] = hidden.to(self._device)

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
        c = self._config
        # always in pieces of K rows, so that a pool read back gives the bits its blocks gave one by one
        for start in range(0, hidden.shape[0], c.num_tokens):
            piece = slice(start, start + c.num_tokens)
            at = slots[piece].to(key.device)
            keys, values = project_memory(hidden[piece], norm, c.rms_norm_eps, weight, bias, c.num_kv_heads)
            key[:, at], value[:, at] = keys, values

    # ------------------------------------------------------------ one step's reads

    def _causal_bias(self, queries: int, keys: int) -> Tensor | None:
        """[1, 1, G * queries, keys]: the last ``queries`` of ``keys`` positions look at none after themselves."""
        if queries == 1:
            return None
        own = torch.full((queries, queries), -torch.inf, dtype=self._dtype, device=self._device).triu(1)
        return F.pad(own, (keys - queries, 0)).repeat(self._config.group_size, 1)[None, None]

    def _span(self, reading: Reading) -> _Span:
        bias = self._causal_bias(reading.rows.stop - reading.rows.start, reading.seen)
        table = reading.table[: reading.seen].to(self._device)
        return _Span(reading.rows, reading.hot, reading.slot, table, bias)

    def _buckets(self, readings: list[Reading]) -> list[_Bucket]:
        by_size: dict[int, list[int]] = {}
        for index, reading in enumerate(readings):
            by_size.setdefault(max(reading.seen, _SHORTEST_BUCKET).bit_length(), []).append(index)
        buckets = []
        for members in by_size.values():
            longest = max(readings[i].seen for i in members)
            # row 0 stands in for the absent ones of shorter contexts
            table = torch.zeros(len(members), longest, dtype=torch.int64)
            hidden = torch.zeros(len(members), 1, 1, longest, dtype=self._dtype)
            for place, index in enumerate(members):
                seen = readings[index].seen
                table[place, :seen] = readings[index].table[:seen]
                hidden[place, :, :, seen:] = -torch.inf
            rows: Tensor | slice = slice(0, len(readings))
            if len(members) < len(readings):
                rows = torch.tensor(members, device=self._device)
            ragged = any(readings[i].seen != longest for i in members)
            buckets.append(_Bucket(rows, table.to(self._device), hidden.to(self._device) if ragged else None))
        return buckets


def _pool_runs(readings: list[Reading]) -> list[_PoolRun]:
    """Runs of neighbouring pools with as many readers each; rows without a pool come last and have none."""
    runs: list[_PoolRun] = []
    row = 0
    for (hot, slot), group in groupby(readings, key=lambda r: (r.hot, r.slot)):
        count = len(list(group))
        if hot is None or slot is None:
            break
        last = runs[-1] if runs else None
        if (
            last is not None
            and last.hot.stop == hot
            and last.slots.stop == slot
            and (last.rows.stop - last.rows.start) == count * last.pools
        ):
            runs[-1] = _PoolRun(
                slice(last.rows.start, row + count),
                slice(last.hot.start, hot + 1),
                slice(last.slots.start, slot + 1),
            )
        else:
            runs.append(_PoolRun(slice(row, row + count), slice(hot, hot + 1), slice(slot, slot + 1)))
        row += count
    return runs


def _pool(pools: Pools, layer: int, hot: slice, slots: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated K, V and bias of neighbouring pools in one layer."""
    assert pools.hot_key is not None
    assert pools.bias is not None
    value = pools.value[layer, slots] if pools.hot_value is None else pools.hot_value[layer, hot]
    return pools.hot_key[layer, hot], value, pools.bias[layer, hot, None, None]


@dataclass(frozen=True)
class _Reads:
    """See ``app.model.operations.Attend``."""

    config: ModelConfig
    decode: int
    runs: list[_PoolRun]
    buckets: list[_Bucket]
    spans: list[_Span]

    def __call__(self, layer: int, query: Tensor, pools: Pools, cache: ContextCache, out: Tensor) -> None:
        if self.decode:
            self._decode(layer, query, pools, cache, out)
        for span in self.spans:
            self._prefill(layer, span, query, pools, cache, out)

    def _decode(self, layer: int, query: Tensor, pools: Pools, cache: ContextCache, out: Tensor) -> None:
        """One query row a sequence: its pool, in runs of neighbours, and its context, in buckets of length."""
        c, rows = self.config, self.decode
        context = out.new_empty(rows, c.num_heads, c.head_dim)
        normaliser = torch.empty(rows, c.num_heads, dtype=torch.float32, device=out.device)
        for bucket in self.buckets:
            count, length = bucket.table.shape
            shape = (count, length, c.num_kv_heads, c.head_dim)
            flat = bucket.table.view(-1)
            output, norm = partial_attention(
                query[bucket.rows].view(count, c.num_kv_heads, c.group_size, c.head_dim),
                cache.key[layer].index_select(0, flat).view(shape).transpose(1, 2),
                cache.value[layer].index_select(0, flat).view(shape).transpose(1, 2),
                bucket.bias,
            )
            context[bucket.rows] = output.reshape(count, c.num_heads, c.head_dim)
            normaliser[bucket.rows] = norm.reshape(count, c.num_heads)
        for run in self.runs:
            packed = query[run.rows].view(run.pools, -1, c.num_heads, c.head_dim)
            tokens = packed.shape[1]
            output, norm = partial_attention(
                pack_heads(packed, c.num_kv_heads),
                *_pool(pools, layer, run.hot, run.slots),
            )
            output = unpack_heads(output, tokens).view(-1, c.num_heads, c.head_dim)
            norm = unpack_heads(norm[..., None], tokens).view(-1, c.num_heads)
            context[run.rows], _ = merge(output, norm, context[run.rows], normaliser[run.rows])
        out[:rows] = context.view(rows, -1)

    def _prefill(
        self, layer: int, span: _Span, query: Tensor, pools: Pools, cache: ContextCache, out: Tensor
    ) -> None:
        """A chunk of a prompt: the pool without a mask, bos and prompt causally."""
        packed = pack_heads(query[span.rows][None], self.config.num_kv_heads)
        output, norm = partial_attention(
            packed,
            cache.key[layer].index_select(0, span.table).transpose(0, 1)[None],
            cache.value[layer].index_select(0, span.table).transpose(0, 1)[None],
            span.bias,
        )
        if span.hot is not None and span.slot is not None:
            pool, pool_norm = partial_attention(
                packed,
                *_pool(pools, layer, slice(span.hot, span.hot + 1), slice(span.slot, span.slot + 1)),
            )
            output, _ = merge(pool, pool_norm, output, norm)
        out[span.rows] = unpack_heads(output, span.rows.stop - span.rows.start)[0]
