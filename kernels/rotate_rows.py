# Triton's functions are untyped
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""A step's queries and keys rotated, and its K and V put into the context cache, in one launch.

``kernels.rotate.rotate_rows`` is the torch twin: eight launches, more for rows that lie apart.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks import FLOATS, BadKernelInput, elements, expect, expect_device, expect_head_dim

_HALF_ELEMENTS = 512


# numbers that are masks' alone: specialised to what they happen to be, there would be a compilation for each kind
# of them, while others wait. Write rows are a part of what a step sends, and lie as that has it.
@triton.jit(do_not_specialize=["rows", "reads", "cache_rows"], do_not_specialize_on_alignment=["write_rows"])
def rotate_rows_kernel(
    qkv,
    cos,
    sin,
    write_rows,
    query,
    cache_key,
    cache_value,
    rows,
    reads,
    cache_rows,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    padded_half: tl.constexpr,
    step: tl.constexpr,
):
    """Program (step of heads of all rows): in a row the query heads come first, then K's, then V's."""
    each: tl.constexpr = heads + 2 * kv_heads
    half: tl.constexpr = head_dim // 2
    index = tl.program_id(0).to(tl.int64) * step + tl.arange(0, step)
    row = index // each
    head = index % each
    dim = tl.arange(0, padded_half)[None, :]
    held = (row < rows)[:, None] & (dim < half)
    at = qkv + index[:, None] * head_dim + dim
    low = tl.load(at, mask=held, other=0.0).to(tl.float32)
    high = tl.load(at + half, mask=held, other=0.0).to(tl.float32)
    turning = held & (head < heads + kv_heads)[:, None]
    turn = row[:, None] * head_dim + dim
    c = tl.load(cos + turn, mask=turning, other=1.0).to(tl.float32)
    s = tl.load(sin + turn + half, mask=turning, other=0.0).to(tl.float32)
    kind = qkv.dtype.element_ty
    # a value is what it was, whatever it is: infinity times zero would not be
    turned_low = tl.where(turning, low * c - high * s, low).to(kind)
    turned_high = tl.where(turning, high * c + low * s, high).to(kind)
    asked = held & (head < heads)[:, None]
    to = query + (row * heads + head)[:, None] * head_dim + dim
    tl.store(to, turned_low, mask=asked)
    tl.store(to + half, turned_high, mask=asked)
    key = turning & (head >= heads)[:, None]
    # self-updates read their keys where they are
    tl.store(at, turned_low, mask=key)
    tl.store(at + half, turned_high, mask=key)
    place = tl.load(write_rows + row, mask=row < reads, other=-1)
    # a row outside the cache would be another tenant's memory
    kept = (place >= 0) & (place < cache_rows)
    own = tl.where(head < heads + kv_heads, head - heads, head - heads - kv_heads)
    cached = (place * kv_heads + own)[:, None] * head_dim + dim
    tl.store(cache_key + cached, turned_low, mask=key & kept[:, None])
    tl.store(cache_key + cached + half, turned_high, mask=key & kept[:, None])
    value = held & (kept & (head >= heads + kv_heads))[:, None]
    tl.store(cache_value + cached, turned_low, mask=value)
    tl.store(cache_value + cached + half, turned_high, mask=value)


def constants(heads: int, kv_heads: int, head_dim: int) -> dict[str, int]:
    """What ``rotate_rows_kernel`` is specialised to."""
    padded: int = triton.next_power_of_2(head_dim // 2)
    return {
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "padded_half": padded,
        "step": max(1, elements(_HALF_ELEMENTS) // padded),
    }


def write_rotated_rows(
    qkv: Tensor, cos: Tensor, sin: Tensor, write_rows: Tensor, cache_key: Tensor, cache_value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotates the queries and keys of ``qkv`` [rows, (H + 2 H_kv) d_head], and writes K and V of its first rows to
    the rows ``write_rows`` int64 [reads] of ``cache_key`` and ``cache_value`` [cache rows, H_kv, d_head].

    ``cos``, ``sin`` [rows, d_head] in the dtype of ``qkv``, the first half of ``sin`` negative. A row outside the cache
    is not written. Returns the queries [rows, H, d_head], and K (rotated in place) and V [rows, H_kv, d_head] as views
    of ``qkv``. Raises ``BadKernelInput``.
    """
    head_dim = cache_key.shape[-1] if cache_key.dim() == 3 else 0
    expect_head_dim(head_dim)
    expect("qkv", qkv, (None, None), FLOATS, qkv)
    expect_device(qkv)
    dtypes = (qkv.dtype,)
    expect("cache_key", cache_key, (None, None, head_dim), dtypes, qkv)
    expect("cache_value", cache_value, tuple(cache_key.shape), dtypes, qkv)
    cache_rows, kv_heads, _ = cache_key.shape
    rows, width = qkv.shape
    heads = width // head_dim - 2 * kv_heads
    if heads < 1 or width % head_dim:
        raise BadKernelInput(
            f"qkv has {width} columns, expected heads of {head_dim} beside {kv_heads} of K and of V"
        )
    expect("cos", cos, (rows, head_dim), dtypes, qkv)
    expect("sin", sin, (rows, head_dim), dtypes, qkv)
    expect("write_rows", write_rows, (None,), (torch.int64,), qkv)
    reads = write_rows.shape[0]
    if reads > rows:
        raise BadKernelInput(f"write_rows has {reads} rows, qkv {rows}")
    query = qkv.new_empty(rows, heads, head_dim)
    if rows:
        fixed = constants(heads, kv_heads, head_dim)
        grid = (triton.cdiv(rows * (heads + 2 * kv_heads), fixed["step"]),)
        rotate_rows_kernel[grid](
            qkv,
            cos,
            sin,
            write_rows,
            query,
            cache_key,
            cache_value,
            rows,
            reads,
            cache_rows,
            **fixed,
            num_warps=4,
        )
    _, key, value = qkv.view(rows, heads + 2 * kv_heads, head_dim).split_with_sizes(
        [heads, kv_heads, kv_heads], dim=1
    )
    return query, key, value
