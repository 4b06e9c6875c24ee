"""The ways to attend that are timed, each with what it should have read; a wrong one is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.bench.pools import Data, hot_copies
from kernels.memory_attention import (
    Rotation,
    Scratch,
    Tuning,
    decode_tile_rows,
    memory_attention,
    reference,
    tuning,
)
from kernels.plan import Plan, PlanShape
from kernels.quantise import dequantise_key, dequantise_value, quantise_key, quantise_value

# The largest error, in standard deviations of the exact output. Averages over a pool are small: over 12,800 unit
# normals their deviation is 0.0146, their largest 0.065. There a bfloat16 is within half of 2^-11 of what it stands
# for, 1.7 % of the deviation; three times that is allowed, for weights are rounded as well. A kernel that ignores the
# context is off by 35 %, one that loses a share of 33 by 74 %, and in absolute numbers by no more than 0.011.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class WrongKernel(RuntimeError):
    """A kernel's output is not its twin's; it is not timed."""


@dataclass(frozen=True)
class Variant:
    """``attend(layer)`` writes to ``out``; ``key``, ``value`` and the first ``limit`` rows of contexts are what it
    should have attended to."""

    attend: Callable[[int], object]
    out: Tensor
    key: Tensor
    value: Tensor
    limit: int
    bytes_per_element: float


@dataclass(frozen=True)
class Stored:
    """Pools as a form of the kernel reads them, and as the twin does; the scales of an 8-bit one, a pair a layer."""

    key: Tensor
    value: Tensor
    exact_key: Tensor
    exact_value: Tensor
    scales: list[tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, data: Data, *, rotating: bool, eight_bit: bool) -> Stored:
        if not eight_bit:
            return cls(data.key if rotating else data.hot_key, data.value, data.hot_key, data.value, [])
        scale = data.scale[:, None]
        key = quantise_key(data.key, scale)
        value, by_token = quantise_value(data.value)
        exact_value = dequantise_value(value, by_token, data.value.dtype)
        exact_key = hot_copies(dequantise_key(key, scale, data.key.dtype), data.rank, data.cos, data.sin)
        # integers hold no NaN, their scales do
        by_token.masked_fill_((data.rank < 0)[:, :, None], torch.nan)
        return cls(key, value, exact_key, exact_value, list(zip(data.scale, by_token, strict=True)))


def of_kernel(
    data: Data,
    sequences: int,
    *,
    rotating: bool,
    eight_bit: bool = False,
    stored: Stored | None = None,
    tuned: Tuning | None = None,
) -> Variant:
    """This server's kernel, on rotated copies, turning keys as it reads, or on 8 bits; ``tuned`` as the server has it
    unless it is given."""
    shape, rows, device = data.shape, data.query.shape[1], data.query.device
    tile_rows = decode_tile_rows(shape.group, sequences)
    if tuned is None:
        tuned = tuning(shape.head_dim, data.query.dtype, tile_rows, rotated=not rotating, eight_bit=eight_bit)
    workers = tuned.workers(shape.kv_heads, device)
    planned = PlanShape(rows, workers, tile_rows, shape.group, tuned.step)
    host = Plan.allocate(planned, "cpu", pinned=device.type == "cuda")
    plan = Plan.allocate(planned, device)
    pools = (data.tenants, data.tenants)
    limits = [shape.context] * rows
    tables = (rows, shape.context)
    host.fill(data.owner, data.owner, range(rows), limits, pool_slots=shape.slots, pools=pools, tables=tables)
    plan.copy_(host)
    scratch = Scratch.allocate(planned, shape.kv_heads, shape.head_dim, device)
    out = torch.full_like(data.query[0], torch.nan)
    held = stored or Stored.of(data, rotating=rotating, eight_bit=eight_bit)

    def attend(layer: int) -> None:
        memory_attention(
            data.query[layer],
            held.key[layer],
            held.value[layer],
            None if rotating else data.bias[layer],
            data.cache_key[layer],
            data.cache_value[layer],
            data.table,
            plan,
            scratch,
            out,
            rotation=Rotation(
                data.rank[layer], data.cos, data.sin, 1, *(held.scales[layer] if held.scales else ())
            )
            if rotating
            else None,
            compiled=tuned,
        )

    element = 1 + 4 / (2 * shape.head_dim) if eight_bit else data.key.itemsize
    return Variant(attend, out, held.exact_key, held.exact_value, shape.context, element)


def of_sdpa(data: Data, sequences: int) -> Variant:
    """The most torch can do: one call for all pools, gathered and rotated beforehand, so that no mask is needed, and
    contexts left out."""
    shape = data.shape
    heads = shape.kv_heads * shape.group
    key, value = data.gathered(data.hot_key), data.gathered(data.value)
    out = torch.full_like(data.query[0], torch.nan)
    by_tenant = out.view(data.tenants, sequences, heads, shape.head_dim)

    def attend(layer: int) -> None:
        query = data.query[layer].view(by_tenant.shape).transpose(1, 2)
        result = F.scaled_dot_product_attention(query, key[layer], value[layer], enable_gqa=True)
        by_tenant.copy_(result.transpose(1, 2))

    return Variant(attend, out, data.hot_key, data.value, 0, data.key.itemsize)


def error(data: Data, variant: Variant, layer: int) -> float:
    """The largest difference from float64, in deviations of a row's exact output; infinite if one is NaN.

    Over a few rows: the twin takes gigabytes a row.
    """
    worst = 0.0
    for row in sorted({0, data.query.shape[1] // 2, data.query.shape[1] - 1}):
        pool = slice(data.owner[row], data.owner[row] + 1)
        exact = reference(
            data.query[layer, row : row + 1].double(),
            variant.key[layer, pool].double(),
            variant.value[layer, pool].double(),
            data.rank[layer, pool] >= 0,
            data.cache_key[layer].double(),
            data.cache_value[layer].double(),
            data.table[row : row + 1],
            [0],
            [0],
            [0],
            [variant.limit],
        )[0]
        off = float((variant.out[row].double() - exact).abs().max() / exact.std())
        worst = max(worst, off if off == off else float("inf"))
    return worst


def check(name: str, data: Data, variant: Variant) -> None:
    """Attends once, in the last layer. Raises WrongKernel."""
    layer = data.layers - 1
    variant.attend(layer)
    off, most = error(data, variant, layer), TOLERANCE[data.query.dtype]
    if not off <= most:
        raise WrongKernel(f"{name}: off by {off:.2g} standard deviations, {most:g} are rounding")
