# Triton's functions are untyped
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""A new block's K and V written straight into a pool's spare slots. ``kernels.update_write`` is the torch twin.

RMSNorm and the projection are one kernel: a row's root mean square is a factor of all its outputs, so it is
gathered while the row is multiplied and applied at the end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks import FLOATS, BadKernelInput, expect, expect_device, expect_head_dim, expect_range


@triton.jit
def write_block_kernel(
    hidden,
    norm,
    weight,
    bias,
    slots,
    key,
    value,
    tokens,
    eps,
    hidden_size: tl.constexpr,
    pool_slots: tl.constexpr,
    half: tl.constexpr,
    head_dim: tl.constexpr,
    biased: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
    depth: tl.constexpr,
    precision: tl.constexpr,
):
    """Program (rows, columns): a tile of the block's outputs, the columns of K first, then those of V."""
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    column = tl.program_id(1) * columns + tl.arange(0, columns)
    own = row < tokens
    wanted = column < 2 * half
    product = tl.zeros([rows, columns], tl.float32)
    squares = tl.zeros([rows], tl.float32)
    for begin in range(0, hidden_size, depth):
        inner = begin + tl.arange(0, depth)
        inside = inner < hidden_size
        x = tl.load(
            hidden + row.to(tl.int64)[:, None] * hidden_size + inner[None, :],
            mask=own[:, None] & inside[None, :],
            other=0.0,
        )
        scale = tl.load(norm + inner, mask=inside, other=0.0)
        w = tl.load(
            weight + column.to(tl.int64)[:, None] * hidden_size + inner[None, :],
            mask=wanted[:, None] & inside[None, :],
            other=0.0,
        )
        wide = x.to(tl.float32)
        squares += tl.sum(wide * wide, 1)
        scaled = (wide * scale.to(tl.float32)[None, :]).to(w.dtype)
        product = tl.dot(scaled, tl.trans(w), product, input_precision=precision)
    product = product * tl.rsqrt(squares / hidden_size + eps)[:, None]
    if biased:
        product += tl.load(bias + column, mask=wanted, other=0.0).to(tl.float32)[None, :]
    slot = tl.load(slots + row, mask=own, other=0)
    within = column % half
    at = (within // head_dim).to(tl.int64)[None, :] * (pool_slots * head_dim)
    at = at + slot[:, None] * head_dim + (within % head_dim)[None, :]
    result = product.to(key.dtype.element_ty)
    tl.store(key + at, result, mask=own[:, None] & (column < half)[None, :])
    tl.store(value + at, result, mask=own[:, None] & ((column >= half) & wanted)[None, :])


def constants(
    hidden_size: int, pool_slots: int, kv_heads: int, head_dim: int, *, biased: bool
) -> dict[str, object]:
    """What ``write_block_kernel`` is specialised to."""
    return {
        "hidden_size": hidden_size,
        "pool_slots": pool_slots,
        "half": kv_heads * head_dim,
        "head_dim": head_dim,
        "biased": biased,
        "rows": _ROWS,
        "columns": _COLUMNS,
        "depth": 32,
        "precision": "tf32x3",
    }


_ROWS = 64
_COLUMNS = 64


def spare_slots(slots: Tensor, pool_slots: int, device: torch.device | str) -> Tensor:
    """``slots`` int64 [L, K] on the host, as ``forgetting.renumber`` gives them, int32 on ``device``.

    Raises ``BadKernelInput`` if one is outside the pool or named twice in a layer.
    """
    if slots.device.type != "cpu" or slots.dim() != 2 or slots.dtype not in (torch.int32, torch.int64):
        raise BadKernelInput("slots must be integers [L, K] on the host, where they can be checked")
    if slots.numel():
        expect_range("slots", int(slots.min()), int(slots.max()), 0, pool_slots - 1)
        if (slots.sort(dim=1).values.diff(dim=1) == 0).any():
            raise BadKernelInput("slots names a slot twice")
    return slots.to(torch.int32).to(device, non_blocking=True)


def write_block(
    hidden: Tensor,
    norm: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    slots: Tensor,
    key: Tensor,
    value: Tensor,
) -> None:
    """Writes K (un-rotated) and V of ``hidden`` [T, d], one layer's block, to ``slots`` int32 [T] of a pool.

    ``norm`` [d] is the layer's input RMSNorm, ``weight`` [2 * H_kv * d_head, d] its K rows, then its V rows,
    ``bias`` [2 * H_kv * d_head] or None; ``key``, ``value`` [H_kv, S, d_head]. ``slots`` comes from
    ``spare_slots``, which has checked them. Raises ``BadKernelInput``.
    """
    expect("hidden", hidden, (None, None), FLOATS, hidden)
    expect_device(hidden)
    dtypes = (hidden.dtype,)
    tokens, width = hidden.shape
    expect("key", key, (None, None, None), dtypes, hidden)
    expect("value", value, tuple(key.shape), dtypes, hidden)
    kv_heads, pool_slots, head_dim = key.shape
    expect_head_dim(head_dim)
    expect("norm", norm, (width,), dtypes, hidden)
    expect("weight", weight, (2 * kv_heads * head_dim, width), dtypes, hidden)
    if bias is not None:
        expect("bias", bias, (2 * kv_heads * head_dim,), dtypes, hidden)
    expect("slots", slots, (tokens,), (torch.int32,), hidden)
    if tokens > pool_slots:
        raise BadKernelInput(f"{tokens} tokens do not fit a pool of {pool_slots} slots")
    if tokens == 0:
        return
    grid = (triton.cdiv(tokens, _ROWS), triton.cdiv(2 * kv_heads * head_dim, _COLUMNS))
    write_block_kernel[grid](
        hidden,
        norm,
        weight,
        weight if bias is None else bias,
        slots,
        key,
        value,
        tokens,
        eps,
        **constants(width, pool_slots, kv_heads, head_dim, biased=bias is not None),
        num_warps=4,
        num_stages=3,
    )
