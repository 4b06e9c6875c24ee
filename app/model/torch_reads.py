"""One step's reads in torch: each row's context and its pool, joined.

Contexts of similar length become one batched product. Pools are read one by one, wherever they lie, but all that is
done to their scores is done to those of many rows at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from app.model.batch import ContextCache, Reading
from app.model.config import ModelConfig
from app.model.pools import Pools
from kernels.attention import MANY_ROWS, pack_heads, partial_attention, unpack_heads
from kernels.linear import streamed
from kernels.pool_attention import PoolAttention

_SHORTEST_BUCKET = 64
_KEPT_BIAS = 2**16
_SCORES = 2**18
"""Scores that exist at once, unless one pool has more: what a processor's cache holds."""


@dataclass(frozen=True)
class _Bucket:
    """Decode rows of similar context length. ``table`` [B, C] cache rows, ``bias`` [B, 1, 1, C]."""

    rows: Tensor | slice
    table: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class _Spans:
    """Chunks of prompts of equal lengths, of n tokens each. ``table`` [B, C] cache rows, their own last; ``bias``
    [1, 1, G * n, C]."""

    rows: Tensor | slice
    tokens: int
    table: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class _Member:
    """Neighbouring rows that read the same version of a pool: readers of it that decode, or a chunk of a prompt."""

    rows: slice
    hot: int
    slot: int

    @property
    def tokens(self) -> int:
        return int(self.rows.stop - self.rows.start)


@dataclass(frozen=True)
class _Group:
    """Members side by side. Where one has several tokens, ``order`` int64 [rows * H] puts query rows into the order of
    heads, tokens in each member, and ``back`` undoes that. ``copies`` int64 [rows * H] is each of these rows' copy.
    ``attend`` is None where keys do not lie by channel, or one pool has so many rows that its heads are taken alone."""

    members: list[_Member]
    copies: Tensor
    order: Tensor | None
    back: Tensor | None
    attend: PoolAttention | None

    @property
    def rows(self) -> slice:
        return slice(self.members[0].rows.start, self.members[-1].rows.stop)


class Reads:
    """See ``app.model.operations.Attend``. ``readings`` and ``decode`` as in ``Operations.prepare``, ``by_channel`` as
    in ``PoolForm``."""

    def __init__(
        self,
        config: ModelConfig,
        readings: list[Reading],
        decode: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        by_channel: bool,
    ) -> None:
        self._config, self._dtype, self._device = config, dtype, device
        self._rows = readings[-1].rows.stop
        self._buckets = self._bucketed(readings[:decode])
        self._spans = self._spans_of(readings[decode:])
        self._by_channel = by_channel
        groups = self._grouped(_members(readings, decode))
        self._scratch = self._scratch_for(groups)
        self._groups = [self._group(members) for members in groups]

    # ------------------------------------------------------------ preparing

    def _spans_of(self, readings: list[Reading]) -> list[_Spans]:
        alike: dict[tuple[int, int], list[Reading]] = {}
        for reading in readings:
            alike.setdefault((reading.rows.stop - reading.rows.start, reading.seen), []).append(reading)
        spans = []
        for (tokens, seen), members in alike.items():
            bias = causal_bias(self._config, tokens, seen, self._dtype, self._device)
            table = torch.stack([member.table[:seen] for member in members]).to(self._device)
            rows: Tensor | slice = members[0].rows
            if len(members) > 1:
                own = [torch.arange(member.rows.start, member.rows.stop) for member in members]
                rows = torch.cat(own).to(self._device)
            spans.append(_Spans(rows, tokens, table, bias))
        return spans

    def _bucketed(self, readings: list[Reading]) -> list[_Bucket]:
        by_size: dict[int, list[int]] = {}
        for index, reading in enumerate(readings):
            by_size.setdefault(max(reading.seen, _SHORTEST_BUCKET).bit_length(), []).append(index)
        buckets = []
        for members in by_size.values():
            lengths = [readings[i].seen for i in members]
            longest = max(lengths)
            # row 0 stands in for the absent ones of shorter contexts
            table = torch.zeros(len(members), longest, dtype=torch.int64)
            for place, index in enumerate(members):
                table[place, : lengths[place]] = readings[index].table[: lengths[place]]
            bias = None
            if min(lengths) < longest:
                absent = torch.arange(longest)[None] >= torch.tensor(lengths)[:, None]
                bias = torch.zeros(table.shape, dtype=self._dtype).masked_fill_(absent, -torch.inf)
                bias = bias[:, None, None].to(self._device)
            rows: Tensor | slice = slice(0, len(readings))
            if len(members) < len(readings):
                rows = torch.tensor(members, device=self._device)
            buckets.append(_Bucket(rows, table.to(self._device), bias))
        return buckets

    def _grouped(self, members: list[_Member]) -> list[list[_Member]]:
        """Members side by side, as many as have few enough scores together."""
        groups: list[list[_Member]] = []
        most = max(1, _SCORES // (self._config.num_heads * self._config.pool_slots))
        for member in members:
            last = groups[-1] if groups else None
            if (
                last is not None
                and last[-1].rows.stop == member.rows.start
                and member.rows.stop - last[0].rows.start <= most
            ):
                last.append(member)
            else:
                groups.append([member])
        return groups

    def _scratch_for(self, groups: list[list[_Member]]) -> Tensor:
        c = self._config
        most = max((members[-1].rows.stop - members[0].rows.start for members in groups), default=0)
        size = PoolAttention.scratch_elements(most * c.group_size, c.num_kv_heads, c.head_dim, c.pool_slots)
        return torch.empty(size if self._by_channel else 0, dtype=self._dtype, device=self._device)

    def _group(self, members: list[_Member]) -> _Group:
        c = self._config
        tokens = torch.tensor([member.tokens for member in members])
        copies = torch.tensor([member.hot for member in members]).repeat_interleave(tokens * c.num_heads)
        order = back = None
        if any(member.tokens > 1 for member in members):
            first, orders = 0, []
            for member in members:
                own = _by_head(member.tokens, c.num_kv_heads, c.group_size)
                orders.append(own + first)
                first += len(own)
            order = torch.cat(orders)
            back = order.argsort().to(self._device)
            order = order.to(self._device)
        attend = None
        rows = [member.tokens * c.group_size for member in members]
        if self._by_channel and not (rows[0] >= MANY_ROWS and streamed(c.pool_slots * c.head_dim)):
            attend = PoolAttention(rows, c.num_kv_heads, c.head_dim, c.pool_slots, self._scratch)
        return _Group(members, copies.to(self._device), order, back, attend)

    # ------------------------------------------------------------ attending

    def __call__(self, layer: int, query: Tensor, pools: Pools, cache: ContextCache, out: Tensor) -> None:
        c = self._config
        context = out[: self._rows].view(self._rows, c.num_heads, c.head_dim)
        normaliser = torch.empty(self._rows, c.num_heads, dtype=torch.float32, device=out.device)
        for bucket in self._buckets:
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
        for span in self._spans:
            tokens, (count, length) = span.tokens, span.table.shape
            shape = (count, length, c.num_kv_heads, c.head_dim)
            flat = span.table.view(-1)
            output, norm = partial_attention(
                pack_heads(query[span.rows].view(count, tokens, c.num_heads, c.head_dim), c.num_kv_heads),
                cache.key[layer].index_select(0, flat).view(shape).transpose(1, 2),
                cache.value[layer].index_select(0, flat).view(shape).transpose(1, 2),
                span.bias,
            )
            context[span.rows] = unpack_heads(output, tokens).view(-1, c.num_heads, c.head_dim)
            normaliser[span.rows] = unpack_heads(norm[..., None], tokens).view(-1, c.num_heads)
        for group in self._groups:
            rows = group.rows
            packed = query[rows].reshape(-1, c.head_dim)
            if group.order is not None:
                packed = packed.index_select(0, group.order)
            output, norm = self._pools(layer, group, packed, pools)
            if group.back is not None:
                output, norm = output.index_select(0, group.back), norm.index_select(0, group.back)
            weight = (norm - normaliser[rows].view(-1)).sigmoid_()[:, None].to(output.dtype)
            context[rows].view(-1, c.head_dim).lerp_(output, weight)

    def _pools(self, layer: int, group: _Group, query: Tensor, pools: Pools) -> tuple[Tensor, Tensor]:
        """The members' ``query`` rows [R, d_head], in their order, over their pools: output and log-sum-exp."""
        assert pools.bias is not None
        c, copied = self._config, pools.hot_value is not None
        keys = [pools.hot_keys[layer][member.hot] for member in group.members]
        values = [pools.read_values[layer][member.hot if copied else member.slot] for member in group.members]
        if group.attend is not None:
            bias = pools.bias[layer].index_select(0, group.copies)
            return group.attend(query, keys, values, bias)
        found = []
        sizes = [c.num_heads * member.tokens for member in group.members]
        for member, key, value, own in zip(
            group.members, keys, values, query.split_with_sizes(sizes), strict=True
        ):
            output, norm = partial_attention(
                own.view(1, c.num_kv_heads, -1, c.head_dim),
                (key.transpose(1, 2) if self._by_channel else key)[None],
                value[None],
                pools.bias[layer, member.hot][None, None, None],
            )
            found.append((output.reshape(-1, c.head_dim), norm.reshape(-1)))
        return torch.cat([output for output, _ in found]), torch.cat([norm for _, norm in found])


@lru_cache(maxsize=256)
def _by_head(tokens: int, kv_heads: int, group: int) -> Tensor:
    """int64 [rows * H]: which of a member's query rows by token come one after another by head, tokens in each."""
    return torch.arange(tokens * kv_heads * group).view(tokens, kv_heads, group).permute(1, 2, 0).reshape(-1)


def _members(readings: list[Reading], decode: int) -> list[_Member]:
    """Those with a pool, in the order of rows."""
    members = []
    for (hot, slot), readers in groupby(readings[:decode], key=lambda r: (r.hot, r.slot)):
        rows = [reader.rows for reader in readers]
        if hot is not None and slot is not None:
            members.append(_Member(slice(rows[0].start, rows[-1].stop), hot, slot))
    for reading in readings[decode:]:
        if reading.hot is not None and reading.slot is not None:
            members.append(_Member(reading.rows, reading.hot, reading.slot))
    return members


def causal_bias(
    config: ModelConfig, queries: int, keys: int, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """[1, 1, G * queries, keys]: the last ``queries`` of ``keys`` positions look at none after themselves."""
    if queries == 1:
        return None
    if queries * keys * config.group_size > _KEPT_BIAS:
        return _causal_bias(config.group_size, queries, keys, dtype, device)
    return _kept_bias(config.group_size, queries, keys, dtype, device)


def _causal_bias(group: int, queries: int, keys: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    own = torch.full((queries, queries), -torch.inf, dtype=dtype, device=device).triu(1)
    return F.pad(own, (keys - queries, 0)).repeat(group, 1)[None, None]


# each layer asks for it, and steps are alike
_kept_bias = lru_cache(maxsize=64)(_causal_bias)
