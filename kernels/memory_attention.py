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
from torch import Tensor

from kernels.attention_kernels import merge_kernel, partial_kernel
from kernels.checks import FLOATS, BadKernelInput, expect, expect_device, expect_head_dim
from kernels.plan import Plan, PlanShape

_LOG2_E = math.log2(math.e)
_MERGED_ELEMENTS = 4096
_INTERPRETED_WORKERS = 3


@dataclass(frozen=True)
class Rotation:
    """In-kernel rotation: the pool's keys are un-rotated, and turned as they are read.

    ``rank`` int32 [views, S], -1 for a spare slot; ``cos``, ``sin`` [positions, d_head], the first half of
    ``sin`` negative; rank r stands at position ``first_position`` + r. An 8-bit pool has a ``key_scale`` float32
    [H_kv, d_head] and a ``value_scale`` float32 [slots, H_kv, S]: what one step of its integers is worth.
    """

    rank: Tensor
    cos: Tensor
    sin: Tensor
    first_position: int
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None


@dataclass(frozen=True)
class Tuning:
    """How the partial kernel is compiled: key rows a step, warps a program, stages in flight; how many such programs
    share a multiprocessor, which the work list gives each its worker; and at most how many registers a thread takes.

    Left alone (None), the compiler takes as many as it likes up to 255, but stops at bounds of its own, and where those
    make it spill it must be told of others.
    """

    step: int
    num_warps: int
    num_stages: int
    programs: int = 1
    registers: int | None = None

    def workers(self, kv_heads: int, device: torch.device) -> int:
        """Workers a K/V head, so that all programs run at once: a second wave would begin when the first has ended."""
        if device.type != "cuda":
            return _INTERPRETED_WORKERS
        processors: int = torch.cuda.get_device_properties(device).multi_processor_count
        return max(1, processors * self.programs // kv_heads)


def _power_of_2(number: int) -> int:
    """The least power of two that is not below."""
    power: int = triton.next_power_of_2(number)
    return power


def decode_tile_rows(group: int, sharing: int) -> int:
    """Tile rows for ``sharing`` decoding sequences that read one pool, with ``group`` query heads a K/V head."""
    return max(16, _power_of_2(group), min(64, _power_of_2(sharing * group)))


def prompt_tile_rows(group: int, head_dim: int, dtype: torch.dtype, *, rotated: bool = True) -> int:
    """Tile rows for prompts: as many as a program can hold, so that a pool is read for many tokens at once."""
    # float32 products are made of three and take twice the room, and so do keys being turned
    room = 2**14 if dtype != torch.float32 else 2**13
    if not rotated:
        room //= 2
    return max(16, _power_of_2(group), min(128, room // _power_of_2(head_dim)))


def tuning(
    head_dim: int,
    dtype: torch.dtype,
    tile_rows: int,
    *,
    rotated: bool = True,
    eight_bit: bool = False,
) -> Tuning:
    """As much in flight as hides the memory's latency, in so many programs as a multiprocessor holds at once.

    Each holds its accumulator, the scores and the keys that it turns in registers, and its steps in shared memory:
    the more rows, the shorter the steps. ``kernels.compile`` shows what each takes, and fails where ``programs`` do
    not fit. None of it has been timed: ``python -m kernels.bench --only sweep`` compares it with its neighbours.
    """
    padded = _power_of_2(head_dim)
    held = tile_rows * padded
    wide = tile_rows >= 128 or held >= 2**14
    if dtype == torch.float32:
        # a float32 product is made of three, whose parts are held in registers as well
        if held >= 2**13 or wide or (eight_bit and (tile_rows == 32 or padded >= 128)):
            return Tuning(16, 8, 3)
        return Tuning(16, 4, 3, 2, 240 if tile_rows < 64 else None)
    if eight_bit and padded >= 128:
        # what is unpacked and turned takes all registers of a thread: eight warps are one program
        return Tuning(32 if tile_rows < 64 else 16, 8, 4)
    if not rotated:
        if wide:
            return Tuning(32, 8, 3)
        if tile_rows < 32 and not eight_bit:
            return Tuning(64 if padded < 128 else 32, 4, 3, 3, 168)
        return Tuning(64 if held < 2**11 else 32, 4, 3, 2, 240 if tile_rows < 64 else None)
    if held < 2**13:
        return Tuning(min(64, 2**13 // padded), 4, 3, 2, 240 if tile_rows == 32 else None)
    step = min(64, 2**12 // padded)
    return Tuning(step, 8, 4) if wide else Tuning(step, 4, 4, 2)


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
    [slots, H_kv, S, d_head]; with the scales of an 8-bit pool both are int8. ``cache_key``, ``cache_value``
    [cache rows, H_kv, d_head], ``table`` int32 or int64 [tables, C], its entries cache rows. ``plan`` has been
    filled for these rows; rows it does not hold become 0. Raises ``BadKernelInput``. Nothing here waits for
    the device, so a CUDA graph can hold it.
    """
    shape = plan.shape
    head_dim = query.shape[-1] if query.dim() == 3 else 0
    expect_head_dim(head_dim)
    expect("query", query, (None, None, head_dim), FLOATS, query)
    expect_device(query)
    dtypes = (query.dtype,)
    eight_bit = rotation is not None and rotation.key_scale is not None
    pool_dtypes = (torch.int8,) if eight_bit else dtypes
    expect("value", value, (None, None, None, head_dim), pool_dtypes, query)
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
        expect("key", key, (slots, kv_heads, pool_slots, head_dim), pool_dtypes, query)
        if (rotation.key_scale is None) != (rotation.value_scale is None):
            raise BadKernelInput("an 8-bit pool has scales for its keys and for its values")
        if rotation.key_scale is not None and rotation.value_scale is not None:
            expect("key_scale", rotation.key_scale, (kv_heads, head_dim), (torch.float32,), query)
            expect(
                "value_scale", rotation.value_scale, (slots, kv_heads, pool_slots), (torch.float32,), query
            )
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
        compiled = tuning(
            head_dim, query.dtype, shape.tile_rows, rotated=rotation is None, eight_bit=eight_bit
        )
    if query.shape[0] == 0:
        return
    absent = visibility
    partial_kernel[(kv_heads, shape.workers)](
        query,
        key,
        value,
        absent if rotation is None or rotation.key_scale is None else rotation.key_scale,
        absent if rotation is None or rotation.value_scale is None else rotation.value_scale,
        visibility,
        absent if rotation is None else rotation.cos,
        absent if rotation is None else rotation.sin,
        cache_key,
        cache_value,
        table,
        plan.workers,
        plan.segments,
        plan.members,
        plan.rows,
        scratch.partial,
        scratch.normaliser,
        head_dim**-0.5 * _LOG2_E,
        0 if rotation is None else rotation.first_position,
        table.shape[1],
        **partial_constants(
            shape,
            pool_slots,
            kv_heads,
            head_dim,
            compiled,
            rotating=rotation is not None,
            eight_bit=eight_bit,
        ),
        num_warps=compiled.num_warps,
        num_stages=compiled.num_stages,
        maxnreg=compiled.registers,
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
    shape: PlanShape,
    pool_slots: int,
    kv_heads: int,
    head_dim: int,
    compiled: Tuning,
    *,
    rotating: bool,
    eight_bit: bool = False,
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
        "eight_bit": eight_bit,
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
