# Triton's functions are untyped
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Attention of query rows over their pools, bos and contexts, for many tenants in one launch.

A row is a sequence's decode token or one token of a prompt. It sees its tenant's whole pool, without a mask but
for the spare slots, and of its context the rows up to its own. ``Plan`` says which program reads what;
the partial results of a row's segments are joined by their log-sum-exp in a second kernel.

A hidden key is never loaded: what a spare slot or an absent row holds cannot reach a result, and no tile holds
rows of two pools, so that a NaN in one tenant's memory stays there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks import FLOATS, BadKernelInput, expect, expect_device, expect_head_dim
from kernels.plan import Plan, PlanShape

_LOG2_E = math.log2(math.e)
_MERGED_ELEMENTS = 4096


@dataclass(frozen=True)
class Rotation:
    """In-kernel rotation: the pool's keys are un-rotated, and turned as they are read.

    ``rank`` int32 [views, S], -1 for a spare slot; ``cos``, ``sin`` [positions, d_head], the first half of
    ``sin`` negative; rank r stands at position ``first_position`` + r.
    """

    rank: Tensor
    cos: Tensor
    sin: Tensor
    first_position: int


@dataclass(frozen=True)
class Tuning:
    """How the partial kernel is compiled: key rows a step, warps a program, stages in flight."""

    step: int
    num_warps: int
    num_stages: int


def tuning(head_dim: int, dtype: torch.dtype, tile_rows: int, *, rotated: bool = True) -> Tuning:
    """Steps of about 32 KB of K and V, three in flight, so that two programs share a multiprocessor.

    Shorter steps where accumulators and scores of many rows, or keys being turned, fill the registers.
    """
    padded = triton.next_power_of_2(head_dim)
    held = tile_rows * padded
    crowded = held >= 2**14 or (tile_rows >= 64 and not rotated)
    step = max(16, min(64, 16384 // (padded * dtype.itemsize)) // (2 if crowded else 1))
    if dtype == torch.float32:
        # a float32 product is made of three, whose parts are held in registers as well
        step = 16
    return Tuning(step, 8 if held >= 2**13 else 4, 3)


@triton.jit
def _accumulate(scores, value, visible, accumulator, highest, total, precision: tl.constexpr):
    """One step of the online softmax, in units of log 2."""
    scores = tl.where(visible, scores, float("-inf"))
    higher = tl.maximum(highest, tl.max(scores, 1))
    # a step may hide every key: -inf less -inf would be NaN
    base = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(highest - base)
    total = total * shrink + tl.sum(weights, 1)
    accumulator = tl.dot(
        weights.to(value.dtype), value, accumulator * shrink[:, None], input_precision=precision
    )
    return accumulator, higher, total


@triton.jit
def partial_kernel(
    query,
    key,
    value,
    visibility,
    cos,
    sin,
    cache_key,
    cache_value,
    table,
    workers,
    segments,
    tiles,
    members,
    rows,
    partial,
    normaliser,
    scale,
    first_position,
    table_width,
    pool_slots: tl.constexpr,
    group: tl.constexpr,
    kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    padded_dim: tl.constexpr,
    padded_half: tl.constexpr,
    tile_rows: tl.constexpr,
    width: tl.constexpr,
    step: tl.constexpr,
    rotating: tl.constexpr,
    precision: tl.constexpr,
):
    """Program (head, worker): all the worker's segments, for one K/V head."""
    head = tl.program_id(0)
    worker = tl.program_id(1)
    half: tl.constexpr = head_dim // 2
    dim = tl.arange(0, padded_dim)
    half_dim = tl.arange(0, padded_half)
    place = tl.arange(0, tile_rows)
    member = place // group
    offset = tl.arange(0, step)
    in_dim = (dim < head_dim)[None, :]
    in_half = (half_dim < half)[None, :]
    first = tl.load(workers + worker)
    last = tl.load(workers + worker + 1)
    for segment in range(first, last):
        tile = tl.load(segments + segment * 3)
        start = tl.load(segments + segment * 3 + 1)
        end = tl.load(segments + segment * 3 + 2)
        hot = tl.load(tiles + tile * 3)
        row = tl.load(members + tile * width + member, mask=member < width, other=-1)
        present = row >= 0
        query_row = (row.to(tl.int64) * kv_heads + head) * group + place % group
        at = query + query_row[:, None] * head_dim
        accumulator = tl.zeros([tile_rows, padded_dim], tl.float32)
        highest = tl.full([tile_rows], float("-inf"), tl.float32)
        total = tl.zeros([tile_rows], tl.float32)
        if hot >= 0:
            slot = tl.load(tiles + tile * 3 + 1).to(tl.int64)
            copy = slot if rotating else hot.to(tl.int64)
            keys = key + (copy * kv_heads + head) * (pool_slots * head_dim)
            values = value + (slot * kv_heads + head) * (pool_slots * head_dim)
            seen = visibility + hot.to(tl.int64) * pool_slots
            if rotating:
                low = tl.load(at + half_dim[None, :], mask=present[:, None] & in_half, other=0.0)
                high = tl.load(at + half + half_dim[None, :], mask=present[:, None] & in_half, other=0.0)
                for begin in range(start, end, step):
                    s = begin + offset
                    rank = tl.load(seen + s, mask=s < end, other=-1)
                    visible = rank >= 0
                    mask = visible[:, None] & in_half
                    turn = (rank + first_position)[:, None] * head_dim + half_dim[None, :]
                    c = tl.load(cos + turn, mask=mask, other=0.0)
                    d = tl.load(sin + turn + half, mask=mask, other=0.0)
                    k = keys + s[:, None] * head_dim + half_dim[None, :]
                    low_key = tl.load(k, mask=mask, other=0.0)
                    high_key = tl.load(k + half, mask=mask, other=0.0)
                    turned_low = low_key.to(tl.float32) * c - high_key.to(tl.float32) * d
                    turned_high = high_key.to(tl.float32) * c + low_key.to(tl.float32) * d
                    scores = tl.dot(low, tl.trans(turned_low.to(low.dtype)), input_precision=precision)
                    scores = tl.dot(
                        high, tl.trans(turned_high.to(low.dtype)), scores, input_precision=precision
                    )
                    v = tl.load(
                        values + s[:, None] * head_dim + dim[None, :],
                        mask=visible[:, None] & in_dim,
                        other=0.0,
                    )
                    accumulator, highest, total = _accumulate(
                        scores * scale, v, visible[None, :], accumulator, highest, total, precision
                    )
            else:
                q = tl.load(at + dim[None, :], mask=present[:, None] & in_dim, other=0.0)
                for begin in range(start, end, step):
                    s = begin + offset
                    bias = tl.load(seen + s, mask=s < end, other=float("-inf"))
                    visible = bias == 0
                    mask = visible[:, None] & in_dim
                    k = tl.load(keys + s[:, None] * head_dim + dim[None, :], mask=mask, other=0.0)
                    scores = tl.dot(q, tl.trans(k), input_precision=precision)
                    v = tl.load(values + s[:, None] * head_dim + dim[None, :], mask=mask, other=0.0)
                    accumulator, highest, total = _accumulate(
                        scores * scale, v, visible[None, :], accumulator, highest, total, precision
                    )
        else:
            q = tl.load(at + dim[None, :], mask=present[:, None] & in_dim, other=0.0)
            limit = tl.load(rows + row * 7 + 6, mask=present, other=0)
            owner = tl.load(tiles + tile * 3 + 2).to(tl.int64)
            for begin in range(start, end, step):
                s = begin + offset
                inside = s < end
                held = tl.load(table + owner * table_width + s, mask=inside, other=0).to(tl.int64)
                cached = (held * kv_heads + head)[:, None] * head_dim + dim[None, :]
                mask = inside[:, None] & in_dim
                k = tl.load(cache_key + cached, mask=mask, other=0.0)
                scores = tl.dot(q, tl.trans(k), input_precision=precision)
                v = tl.load(cache_value + cached, mask=mask, other=0.0)
                accumulator, highest, total = _accumulate(
                    scores * scale,
                    v,
                    s[None, :] < tl.minimum(limit, end)[:, None],
                    accumulator,
                    highest,
                    total,
                    precision,
                )
        to = (tl.cast(segment, tl.int64) * kv_heads + head) * tile_rows + place
        divisor = tl.where(total == 0.0, 1.0, total)
        tl.store(
            partial + to[:, None] * head_dim + dim[None, :],
            accumulator / divisor[:, None],
            mask=present[:, None] & in_dim,
        )
        tl.store(normaliser + to, highest + tl.log2(divisor), mask=present)


@triton.jit
def merge_kernel(
    partial,
    normaliser,
    rows,
    out,
    group: tl.constexpr,
    kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    padded_dim: tl.constexpr,
    tile_rows: tl.constexpr,
    chunk: tl.constexpr,
):
    """Program (query head, row): joins the row's segments over its pool, then those over its context."""
    head = tl.program_id(0)
    row = tl.program_id(1)
    dim = tl.arange(0, padded_dim)
    in_dim = dim < head_dim
    accumulator = tl.zeros([padded_dim], tl.float32)
    highest = float("-inf")
    total = 0.0
    for part in tl.static_range(2):
        first = tl.load(rows + row * 7 + part * 3)
        last = tl.load(rows + row * 7 + part * 3 + 1)
        place = tl.load(rows + row * 7 + part * 3 + 2) * group + head % group
        for begin in range(first, last, chunk):
            segment = begin + tl.arange(0, chunk)
            held = segment < last
            at = (segment.to(tl.int64) * kv_heads + head // group) * tile_rows + place
            norm = tl.load(normaliser + at, mask=held, other=float("-inf"))
            seen = held & (norm != float("-inf"))
            found = tl.load(
                partial + at[:, None] * head_dim + dim[None, :],
                mask=seen[:, None] & in_dim[None, :],
                other=0.0,
            )
            higher = tl.maximum(highest, tl.max(norm, 0))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            weight = tl.exp2(norm - base)
            shrink = tl.exp2(highest - base)
            accumulator = accumulator * shrink + tl.sum(weight[:, None] * found, 0)
            total = total * shrink + tl.sum(weight, 0)
            highest = higher
    # rows that the plan does not hold become zero, so that nothing of an earlier step is left in a captured graph
    accumulator = accumulator / tl.where(total == 0.0, 1.0, total)
    to = out + (row.to(tl.int64) * (kv_heads * group) + head) * head_dim + dim
    tl.store(to, accumulator.to(out.dtype.element_ty), mask=in_dim)


@dataclass(frozen=True)
class Scratch:
    """Where segments leave their results: ``partial`` float32 [segments, H_kv, tile_rows, d_head], and
    ``normaliser`` float32 [segments, H_kv, tile_rows] in units of log 2. One serves all layers in turn."""

    partial: Tensor
    normaliser: Tensor

    @classmethod
    def allocate(cls, shape: PlanShape, kv_heads: int, head_dim: int, device: torch.device | str) -> Scratch:
        size = (shape.segments, kv_heads, shape.tile_rows)
        return cls(
            torch.empty(*size, head_dim, dtype=torch.float32, device=device),
            torch.empty(size, dtype=torch.float32, device=device),
        )


def memory_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    cache_key: Tensor,
    cache_value: Tensor,
    table: Tensor,
    plan: Plan,
    scratch: Scratch,
    out: Tensor,
    *,
    rotation: Rotation | None = None,
    compiled: Tuning | None = None,
) -> None:
    """Writes the attention of ``query`` [rows, H, d_head] (rotated), of one layer, to ``out`` (same shape).

    ``key`` [hot, H_kv, S, d_head] are the rotated copies and ``bias`` [hot, S] theirs (0, or -inf for a spare
    slot); with ``rotation`` ``key`` [slots, H_kv, S, d_head] is un-rotated and ``bias`` None. ``value``
    [slots, H_kv, S, d_head]. ``cache_key``, ``cache_value`` [cache rows, H_kv, d_head], ``table`` int32 or
    int64 [tables, C], its entries cache rows. ``plan`` has been filled for these rows; rows it does not hold
    become 0. Raises ``BadKernelInput``. Nothing here waits for the device, so a CUDA graph can hold it.
    """
    shape = plan.shape
    head_dim = query.shape[-1] if query.dim() == 3 else 0
    expect_head_dim(head_dim)
    expect("query", query, (None, None, head_dim), FLOATS, query)
    expect_device(query)
    dtypes = (query.dtype,)
    expect("value", value, (None, None, None, head_dim), dtypes, query)
    slots, kv_heads, pool_slots, _ = value.shape
    if query.shape[1] != kv_heads * shape.group:
        raise BadKernelInput(f"query has {query.shape[1]} heads, expected {kv_heads} groups of {shape.group}")
    if query.shape[0] > shape.rows:
        raise BadKernelInput(f"query has {query.shape[0]} rows, the work list at most {shape.rows}")
    if rotation is None:
        if bias is None:
            raise BadKernelInput("rotated keys need a bias that hides their spare slots")
        expect("key", key, (None, kv_heads, pool_slots, head_dim), dtypes, query)
        expect("bias", bias, (key.shape[0], pool_slots), FLOATS, query)
        visibility = bias
    else:
        if bias is not None:
            raise BadKernelInput("with in-kernel rotation the ranks hide spare slots: give no bias")
        expect("key", key, (slots, kv_heads, pool_slots, head_dim), dtypes, query)
        expect("rank", rotation.rank, (None, pool_slots), (torch.int32,), query)
        expect("cos", rotation.cos, (None, head_dim), FLOATS, query)
        expect("sin", rotation.sin, tuple(rotation.cos.shape), (rotation.cos.dtype,), query)
        if rotation.first_position < 0 or rotation.cos.shape[0] < pool_slots + rotation.first_position:
            raise BadKernelInput(f"cos and sin end before position {pool_slots + rotation.first_position}")
        visibility = rotation.rank
    expect("cache_key", cache_key, (None, kv_heads, head_dim), dtypes, query)
    expect("cache_value", cache_value, tuple(cache_key.shape), dtypes, query)
    expect("table", table, (None, None), (torch.int32, torch.int64), query)
    expect("out", out, tuple(query.shape), dtypes, query)
    expect("plan", plan.buffer, (None,), (torch.int32,), query)
    size = (shape.segments, kv_heads, shape.tile_rows)
    expect("scratch.partial", scratch.partial, (*size, head_dim), (torch.float32,), query)
    expect("scratch.normaliser", scratch.normaliser, size, (torch.float32,), query)
    if compiled is None:
        compiled = tuning(head_dim, query.dtype, shape.tile_rows, rotated=rotation is None)
    if query.shape[0] == 0:
        return
    partial_kernel[(kv_heads, shape.workers)](
        query,
        key,
        value,
        visibility,
        visibility if rotation is None else rotation.cos,
        visibility if rotation is None else rotation.sin,
        cache_key,
        cache_value,
        table,
        plan.workers,
        plan.segments,
        plan.tiles,
        plan.members,
        plan.rows,
        scratch.partial,
        scratch.normaliser,
        head_dim**-0.5 * _LOG2_E,
        0 if rotation is None else rotation.first_position,
        table.shape[1],
        **partial_constants(shape, pool_slots, kv_heads, head_dim, compiled, rotation is not None),
        num_warps=compiled.num_warps,
        num_stages=compiled.num_stages,
    )
    merge_kernel[(query.shape[1], query.shape[0])](
        scratch.partial,
        scratch.normaliser,
        plan.rows,
        out,
        **merge_constants(shape, kv_heads, head_dim),
        num_warps=4,
    )


def partial_constants(
    shape: PlanShape, pool_slots: int, kv_heads: int, head_dim: int, compiled: Tuning, rotating: bool
) -> dict[str, object]:
    """What ``partial_kernel`` is specialised to."""
    return {
        "pool_slots": pool_slots,
        "group": shape.group,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "padded_dim": triton.next_power_of_2(head_dim),
        # a product's inner length is at least 16
        "padded_half": max(16, triton.next_power_of_2(head_dim // 2)),
        "tile_rows": shape.tile_rows,
        "width": shape.width,
        "step": compiled.step,
        "rotating": rotating,
        # float32 keeps its digits, on tensor cores: as plain multiplications it fills a program's registers
        "precision": "tf32x3",
    }


def merge_constants(shape: PlanShape, kv_heads: int, head_dim: int) -> dict[str, object]:
    """What ``merge_kernel`` is specialised to."""
    padded = triton.next_power_of_2(head_dim)
    return {
        "group": shape.group,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "padded_dim": padded,
        "tile_rows": shape.tile_rows,
        "chunk": _MERGED_ELEMENTS // padded,
    }


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    cache_key: Tensor,
    cache_value: Tensor,
    table: Tensor,
    hot: list[int],
    slot: list[int],
    owner: list[int],
    limit: list[int],
) -> Tensor:
    """The torch twin: what ``memory_attention`` computes, row by row in the dtype of ``query``.

    ``key`` are rotated copies, ``visible`` bool [hot, S]; the lists are those the plan was filled with.
    """
    kv_heads = value.shape[1]
    group = query.shape[1] // kv_heads
    out = torch.zeros_like(query)
    for row, (h, s, t, n) in enumerate(zip(hot, slot, owner, limit, strict=True)):
        at = table[t, :n].long()
        keys, values = cache_key[at].transpose(0, 1), cache_value[at].transpose(0, 1)
        if h >= 0:
            keys = torch.cat([key[h][:, visible[h]], keys], dim=1)
            values = torch.cat([value[s][:, visible[h]], values], dim=1)
        rows = query[row].view(kv_heads, group, -1)
        weights = (rows @ keys.transpose(1, 2) * query.shape[-1] ** -0.5).softmax(dim=-1)
        out[row] = (weights @ values).view(query.shape[1], -1)
    return out
