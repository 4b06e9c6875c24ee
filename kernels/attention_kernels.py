# Triton's functions are untyped
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""The kernels of ``kernels.memory_attention``, which says what they compute and launches them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _accumulate(
    scores,
    value,
    value_scale,
    visible,
    accumulator,
    highest,
    total,
    dtype: tl.constexpr,
    scaled: tl.constexpr,
    precision: tl.constexpr,
):
    """One step of the online softmax, in units of log 2. An 8-bit value's scale goes to its weight."""
    scores = tl.where(visible, scores, float("-inf"))
    higher = tl.maximum(highest, tl.max(scores, 1))
    # a step may hide every key: -inf less -inf would be NaN
    base = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(highest - base)
    total = total * shrink + tl.sum(weights, 1)
    if scaled:
        weights = weights * value_scale[None, :]
    accumulator = tl.dot(
        weights.to(dtype), value.to(dtype), accumulator * shrink[:, None], input_precision=precision
    )
    return accumulator, higher, total


@triton.jit
def partial_kernel(
    query,
    key,
    value,
    key_scale,
    value_scale,
    visibility,
    cos,
    sin,
    cache_key,
    cache_value,
    table,
    workers,
    segments,
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
    eight_bit: tl.constexpr,
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
        tile = tl.load(segments + segment * 7)
        start = tl.load(segments + segment * 7 + 1)
        end = tl.load(segments + segment * 7 + 2)
        result = tl.load(segments + segment * 7 + 3).to(tl.int64)
        hot = tl.load(segments + segment * 7 + 4)
        row = tl.load(members + tile * width + member, mask=member < width, other=-1)
        present = row >= 0
        query_row = (row.to(tl.int64) * kv_heads + head) * group + place % group
        at = query + query_row[:, None] * head_dim
        accumulator = tl.zeros([tile_rows, padded_dim], tl.float32)
        highest = tl.full([tile_rows], float("-inf"), tl.float32)
        total = tl.zeros([tile_rows], tl.float32)
        if hot >= 0:
            slot = tl.load(segments + segment * 7 + 5).to(tl.int64)
            copy = slot if rotating else hot.to(tl.int64)
            keys = key + (copy * kv_heads + head) * (pool_slots * head_dim)
            values = value + (slot * kv_heads + head) * (pool_slots * head_dim)
            seen = visibility + hot.to(tl.int64) * pool_slots
            if rotating:
                low = tl.load(at + half_dim[None, :], mask=present[:, None] & in_half, other=0.0)
                high = tl.load(at + half + half_dim[None, :], mask=present[:, None] & in_half, other=0.0)
                if eight_bit:
                    # K's scale is its channel's, and belongs to it before the rotation
                    channel = key_scale + head * head_dim + half_dim
                    low_scale = tl.load(channel, mask=half_dim < half, other=0.0)
                    high_scale = tl.load(channel + half, mask=half_dim < half, other=0.0)
                following = tl.load(seen + start + offset, mask=start + offset < end, other=-1)
                for begin in range(start, end, step):
                    s = begin + offset
                    rank = following
                    following = tl.load(seen + s + step, mask=s + step < end, other=-1)
                    visible = rank >= 0
                    mask = visible[:, None] & in_half
                    turn = (rank + first_position)[:, None] * head_dim + half_dim[None, :]
                    c = tl.load(cos + turn, mask=mask, other=0.0)
                    d = tl.load(sin + turn + half, mask=mask, other=0.0)
                    k = keys + s[:, None] * head_dim + half_dim[None, :]
                    low_key = tl.load(k, mask=mask, other=0).to(tl.float32)
                    high_key = tl.load(k + half, mask=mask, other=0).to(tl.float32)
                    weight_scale = total
                    if eight_bit:
                        low_key = low_key * low_scale[None, :]
                        high_key = high_key * high_scale[None, :]
                        token = value_scale + (slot * kv_heads + head) * pool_slots + s
                        weight_scale = tl.load(token, mask=visible, other=0.0)
                    turned_low = low_key * c - high_key * d
                    turned_high = high_key * c + low_key * d
                    scores = tl.dot(low, tl.trans(turned_low.to(low.dtype)), input_precision=precision)
                    scores = tl.dot(
                        high, tl.trans(turned_high.to(low.dtype)), scores, input_precision=precision
                    )
                    v = tl.load(
                        values + s[:, None] * head_dim + dim[None, :],
                        mask=visible[:, None] & in_dim,
                        other=0,
                    )
                    accumulator, highest, total = _accumulate(
                        scores * scale,
                        v,
                        weight_scale,
                        visible[None, :],
                        accumulator,
                        highest,
                        total,
                        low.dtype,
                        eight_bit,
                        precision,
                    )
            else:
                q = tl.load(at + dim[None, :], mask=present[:, None] & in_dim, other=0.0)
                bias = tl.load(seen + start + offset, mask=start + offset < end, other=float("-inf"))
                for begin in range(start, end, step):
                    s = begin + offset
                    visible = bias == 0
                    bias = tl.load(seen + s + step, mask=s + step < end, other=float("-inf"))
                    mask = visible[:, None] & in_dim
                    k = tl.load(keys + s[:, None] * head_dim + dim[None, :], mask=mask, other=0.0)
                    scores = tl.dot(q, tl.trans(k), input_precision=precision)
                    v = tl.load(values + s[:, None] * head_dim + dim[None, :], mask=mask, other=0.0)
                    accumulator, highest, total = _accumulate(
                        scores * scale,
                        v,
                        total,
                        visible[None, :],
                        accumulator,
                        highest,
                        total,
                        q.dtype,
                        False,
                        precision,
                    )
        else:
            q = tl.load(at + dim[None, :], mask=present[:, None] & in_dim, other=0.0)
            limit = tl.load(rows + row * 7 + 6, mask=present, other=0)
            owner = tl.load(segments + segment * 7 + 6).to(tl.int64)
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
                    total,
                    s[None, :] < tl.minimum(limit, end)[:, None],
                    accumulator,
                    highest,
                    total,
                    q.dtype,
                    False,
                    precision,
                )
        to = (result * kv_heads + head) * tile_rows + place
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
