# Triton's functions are untyped
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""A tenant's rotated-K hot copy from its un-rotated keys and ranks. ``kernels.rotate.rotate_pool`` is the torch twin.

Always from the un-rotated keys: turning the last copy by the difference of ranks would add an error each time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks import FLOATS, BadKernelInput, expect, expect_device, expect_head_dim


@triton.jit
def hot_copy_kernel(
    key,
    rank,
    cos,
    sin,
    out,
    first_position,
    key_stride,
    out_stride,
    pool_slots: tl.constexpr,
    kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    padded_half: tl.constexpr,
    step: tl.constexpr,
):
    """Program (step of slots, K/V head, layer)."""
    head = tl.program_id(1)
    layer = tl.program_id(2).to(tl.int64)
    half: tl.constexpr = head_dim // 2
    slot = tl.program_id(0) * step + tl.arange(0, step)
    dim = tl.arange(0, padded_half)[None, :]
    inside = slot < pool_slots
    r = tl.load(rank + layer * pool_slots + slot, mask=inside, other=-1)
    held = (r >= 0)[:, None] & (dim < half)
    offset = (head * pool_slots + slot)[:, None] * head_dim + dim
    source = key + layer * key_stride + offset
    low = tl.load(source, mask=held, other=0.0).to(tl.float32)
    high = tl.load(source + half, mask=held, other=0.0).to(tl.float32)
    turn = (r + first_position)[:, None] * head_dim + dim
    c = tl.load(cos + turn, mask=held, other=0.0).to(tl.float32)
    s = tl.load(sin + turn + half, mask=held, other=0.0).to(tl.float32)
    # spare slots become zero, whatever they held: the torch form reads them with weight zero
    to = out + layer * out_stride + offset
    write = inside[:, None] & (dim < half)
    tl.store(to, (low * c - high * s).to(out.dtype.element_ty), mask=write)
    tl.store(to + half, (high * c + low * s).to(out.dtype.element_ty), mask=write)


def constants(pool_slots: int, kv_heads: int, head_dim: int) -> dict[str, int]:
    """What ``hot_copy_kernel`` is specialised to."""
    padded = triton.next_power_of_2(head_dim // 2)
    return {
        "pool_slots": pool_slots,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "padded_half": padded,
        "step": max(1, 2048 // padded),
    }


def write_hot_copy(
    key: Tensor, rank: Tensor, cos: Tensor, sin: Tensor, first_position: int, out: Tensor
) -> None:
    """Writes ``key`` [L, H_kv, S, d_head], turned to the positions of its ranks, to ``out`` (same shape).

    ``rank`` int32 [L, S], -1 for a spare slot, which becomes 0; ranks are below S. ``cos``, ``sin`` [positions,
    d_head] in any float dtype, the first half of ``sin`` negative. Layers may be apart (a slot of the
    slab). Raises ``BadKernelInput``.
    """
    head_dim = key.shape[-1] if key.dim() == 4 else 0
    expect_head_dim(head_dim)
    expect("key", key, (None, None, None, head_dim), FLOATS, key, inner=3)
    expect_device(key)
    layers, kv_heads, pool_slots, _ = key.shape
    expect("rank", rank, (layers, pool_slots), (torch.int32,), key)
    expect("cos", cos, (None, head_dim), FLOATS, key)
    expect("sin", sin, tuple(cos.shape), (cos.dtype,), key)
    expect("out", out, tuple(key.shape), (key.dtype,), key, inner=3)
    if first_position < 0 or cos.shape[0] < pool_slots + first_position:
        raise BadKernelInput(f"cos and sin end before position {pool_slots + first_position}")
    if key.numel() == 0:
        return
    fixed = constants(pool_slots, kv_heads, head_dim)
    grid = (triton.cdiv(pool_slots, fixed["step"]), kv_heads, layers)
    hot_copy_kernel[grid](
        key, rank, cos, sin, out, first_position, key.stride(0), out.stride(0), **fixed, num_warps=4
    )
