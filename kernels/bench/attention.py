"""Attention over pools: hot copies, in-kernel rotation and 8 bits, beside torch's attention and the copy bandwidth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.bench.report import Row
from kernels.bench.timing import Work, captured, interleaved
from kernels.hot_copy import write_hot_copy
from kernels.memory_attention import (
    Rotation,
    Scratch,
    decode_tile_rows,
    memory_attention,
    reference,
    tuning,
)
from kernels.plan import Plan, PlanShape
from kernels.quantise import dequantise_key, dequantise_value, key_scale, quantise_key, quantise_value

# largest error of an output against float64; values are averages of unit normals
_TOLERANCE = 1e-2
COPIES, ROTATING, EIGHT_BIT, SDPA = "hot copy", "in-kernel rotation", "8 bits", "sdpa, pool alone"


@dataclass(frozen=True)
class Shape:
    """A model's attention; ``layers`` are taken in turn, enough of them that no cache holds all pools."""

    layers: int = 4
    kv_heads: int = 8
    group: int = 4
    head_dim: int = 128
    pool: int = 12_800
    block: int = 256
    context: int = 64

    @property
    def slots(self) -> int:
        return self.pool + self.block


@dataclass(frozen=True)
class Data:
    """Tensors for ``tenants`` with ``sequences`` each."""

    shape: Shape
    query: Tensor
    key: Tensor
    hot_key: Tensor
    value: Tensor
    rank: Tensor
    bias: Tensor
    cos: Tensor
    sin: Tensor
    cache_key: Tensor
    cache_value: Tensor
    table: Tensor
    owner: list[int]

    @classmethod
    def random(
        cls, shape: Shape, tenants: int, sequences: int, dtype: torch.dtype, device: torch.device
    ) -> Data:
        rows = tenants * sequences

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, dtype=dtype, device=device)

        pools = (shape.layers, tenants, shape.kv_heads, shape.slots, shape.head_dim)
        key, value = normal(*pools), normal(*pools)
        rank = torch.rand(shape.layers, tenants, shape.slots, device=device).argsort(dim=-1).int()
        rank[rank >= shape.pool] = -1
        inverse = 5e5 ** (-torch.arange(0, shape.head_dim, 2, device=device) / shape.head_dim) / 1.8125
        angles = torch.arange(shape.slots + 1, device=device)[:, None] * inverse
        cos = torch.cat([angles.cos()] * 2, -1).to(dtype)
        sin = torch.cat([-angles.sin(), angles.sin()], -1).to(dtype)
        hot_key = torch.empty_like(key)
        for tenant in range(tenants):
            ranks = rank[:, tenant].contiguous()
            write_hot_copy(key[:, tenant], ranks, cos, sin, 1, hot_key[:, tenant])
        bias = torch.zeros(rank.shape, dtype=dtype, device=device).masked_fill_(rank < 0, -torch.inf)
        cache = (shape.layers, rows * shape.context, shape.kv_heads, shape.head_dim)
        table = torch.arange(rows * shape.context, dtype=torch.int32, device=device).view(rows, -1)
        owner = [row // sequences for row in range(rows)]
        query = normal(shape.layers, rows, shape.kv_heads * shape.group, shape.head_dim)
        return cls(
            shape, query, key, hot_key, value, rank, bias, cos, sin, normal(*cache), normal(*cache), table, owner
        )  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """``attend(layer)`` writes to ``out``; ``key`` and ``value`` are what it should have attended to."""

    attend: Callable[[int], object]
    out: Tensor
    key: Tensor
    value: Tensor
    bytes_per_element: float


def _kernel(data: Data, sequences: int, *, rotating: bool, eight_bit: bool = False) -> Variant:
    shape, rows, device = data.shape, data.query.shape[1], data.query.device
    tile_rows = decode_tile_rows(shape.group, sequences)
    workers = 3
    if device.type == "cuda":
        workers = max(1, torch.cuda.get_device_properties(0).multi_processor_count * 2 // shape.kv_heads)
    tuned = tuning(shape.head_dim, data.query.dtype, tile_rows, rotated=not rotating, eight_bit=eight_bit)
    planned = PlanShape(rows, workers, tile_rows, shape.group, tuned.step)
    host = Plan.allocate(planned, "cpu", pinned=device.type == "cuda")
    plan = Plan.allocate(planned, device)
    pools = (data.key.shape[1], data.key.shape[1])
    limits = [shape.context] * rows
    tables = (rows, shape.context)
    host.fill(data.owner, data.owner, range(rows), limits, pool_slots=shape.slots, pools=pools, tables=tables)
    plan.copy_(host)
    scratch = Scratch.allocate(planned, shape.kv_heads, shape.head_dim, device)
    out = torch.full_like(data.query[0], torch.nan)
    key, value, exact_key, exact_value = data.key, data.value, data.hot_key, data.value
    scales: list[tuple[Tensor, Tensor]] = []
    if eight_bit:
        scale = key_scale(data.key.transpose(1, 2).flatten(2, 3))
        key = quantise_key(data.key, scale[:, None])
        value, by_token = quantise_value(data.value)
        scales = list(zip(scale, by_token, strict=True))
        exact_value = dequantise_value(value, by_token, data.value.dtype)
        exact_key = torch.empty_like(data.hot_key)
        coarse = dequantise_key(key, scale[:, None], data.key.dtype)
        for tenant in range(coarse.shape[1]):
            ranks = data.rank[:, tenant].contiguous()
            write_hot_copy(coarse[:, tenant], ranks, data.cos, data.sin, 1, exact_key[:, tenant])

    def attend(layer: int) -> None:
        memory_attention(
            data.query[layer],
            key[layer] if rotating else data.hot_key[layer],
            value[layer],
            None if rotating else data.bias[layer],
            data.cache_key[layer],
            data.cache_value[layer],
            data.table,
            plan,
            scratch,
            out,
            rotation=Rotation(data.rank[layer], data.cos, data.sin, 1, *(scales[layer] if scales else ()))
            if rotating
            else None,
        )

    element = 1 + 4 / (2 * shape.head_dim) if eight_bit else data.key.itemsize
    return Variant(attend, out, exact_key, exact_value, element)


def _sdpa(data: Data, sequences: int) -> Variant:
    """What a server without kernels of its own runs: torch's attention, pool by pool."""
    out = torch.full_like(data.query[0], torch.nan)
    heads = data.shape.kv_heads * data.shape.group

    def attend(layer: int) -> None:
        query = data.query[layer].view(-1, sequences, heads, data.shape.head_dim)
        for tenant, rotated in enumerate(data.hot_key[layer]):
            result = F.scaled_dot_product_attention(
                query[tenant].transpose(0, 1)[None],
                rotated[None],
                data.value[layer, tenant][None],
                attn_mask=data.bias[layer, tenant][None, None, None],
                enable_gqa=True,
            )
            out.view(-1, sequences, heads, data.shape.head_dim)[tenant] = result[0].transpose(0, 1)

    return Variant(attend, out, data.hot_key, data.value, data.key.itemsize)


def error(data: Data, variant: Variant, layer: int) -> float:
    """The largest difference from float64, over a few rows (the twin takes gigabytes a row)."""
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
            [data.shape.context],
        )
        difference = (variant.out[row].double() - exact[0]).abs().max()
        worst = max(worst, float("inf") if difference.isnan() else float(difference))
    return worst


@dataclass(frozen=True)
class Case:
    tenants: int
    sequences: int

    @property
    def name(self) -> str:
        return f"{self.tenants} x {self.sequences}"


CASES = (Case(1, 1), Case(1, 16), Case(4, 1), Case(16, 1), Case(32, 1))


class WrongKernel(RuntimeError):
    """A kernel's output is not its twin's; it is not timed."""


def rows(
    shape: Shape,
    cases: tuple[Case, ...],
    dtype: torch.dtype,
    device: torch.device,
    copy: tuple[Work, int],
    rounds: int,
) -> Iterator[Row]:
    """Times all variants. ``copy`` is work that moves so many bytes, the bandwidth's measure. Raises WrongKernel."""
    copying, copied = copy
    alone: dict[str, float] = {}
    for case in cases:
        data = Data.random(shape, case.tenants, case.sequences, dtype, device)
        variants = {
            COPIES: _kernel(data, case.sequences, rotating=False),
            ROTATING: _kernel(data, case.sequences, rotating=True),
            EIGHT_BIT: _kernel(data, case.sequences, rotating=True, eight_bit=True),
            SDPA: _sdpa(data, case.sequences),
        }
        work: dict[str, Work] = {"copy": copying}
        for name, variant in variants.items():
            if name != SDPA:
                variant.attend(shape.layers - 1)
                off = error(data, variant, shape.layers - 1)
                if off > _TOLERANCE:
                    raise WrongKernel(f"{case.name}, {name}: off by {off:.2g}")
            attend = variant.attend
            work[name] = captured(
                lambda attend=attend: [attend(layer) for layer in range(shape.layers)],  # type: ignore[misc]
                device,
            )
        times = interleaved(work, device, rounds)
        bandwidth = copied / times["copy"]
        elements = 2 * shape.layers * case.tenants * shape.pool * shape.kv_heads * shape.head_dim
        for name, variant in variants.items():
            share = elements * variant.bytes_per_element / times[name] / bandwidth
            least = aim = None
            if name == COPIES and case.sequences == 1 and (case.tenants == 1 or case.tenants >= 4):
                least, aim = (0.5, 0.7) if case.tenants == 1 else (0.75, 0.92)
            note = f"{times[name] / shape.layers * 1e6:.1f} us a layer"
            yield Row(
                f"attention, {name}: of the copy bandwidth", case.name, share, "", least, aim, note=note
            )
        faster = times[SDPA] / times[COPIES]
        yield Row("attention, hot copy: times as fast as sdpa", case.name, faster, "x", 1.5, 4)
        if (case.tenants, case.sequences) == (1, 1):
            alone = times
        elif case.tenants == 1 and alone:
            more = times[COPIES] / alone[COPIES]
            yield Row("attention: time against one sequence", case.name, more, "x", 1.25, 1.1, less=True)
        del data, variants, work
        if device.type == "cuda":
            torch.cuda.empty_cache()
