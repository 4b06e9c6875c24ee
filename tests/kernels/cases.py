"""Layers of random tensors for the attention kernels, and what must come out of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kernels.memory_attention import (
    Rotation,
    Scratch,
    Tuning,
    memory_attention,
    reference,
)
from kernels.plan import Plan, PlanShape
from kernels.rotate import rotate_pool

CACHE_ROWS = 23
STEP = 16
# hot, slot, table, limit of each row
Reads = list[tuple[int, int, int, int]]
MIXED: Reads = [(2, 0, 0, 5), (0, 1, 1, 1), (2, 0, 2, 12), (-1, -1, 3, 9), (1, 2, 4, 0), (3, 1, 5, 3)]


@dataclass(frozen=True)
class Case:
    """One layer's tensors; ``hot`` is in version order unlike ``slot``: two versions of pool 1 are read."""

    reads: Reads
    query: Tensor
    key: Tensor
    value: Tensor
    rank: Tensor
    cos: Tensor
    sin: Tensor
    cache_key: Tensor
    cache_value: Tensor
    table: Tensor
    shape: PlanShape

    @classmethod
    def random(
        cls,
        reads: Reads,
        *,
        slots: int = 37,
        spare: int = 5,
        kv_heads: int = 1,
        group: int = 2,
        head_dim: int = 16,
        workers: int = 3,
        tile_rows: int = 16,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> Case:
        generator = torch.Generator().manual_seed(slots + head_dim + group)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator).to(device, dtype)

        owner_of_hot = [1, 2, 0, 1]
        rank = torch.stack([torch.randperm(slots, generator=generator, dtype=torch.int32) for _ in range(4)])
        rank[rank >= slots - spare] = -1
        rank = rank.to(device)
        key, value = normal(3, kv_heads, slots, head_dim), normal(3, kv_heads, slots, head_dim)
        # one pool's spare slots hold poison; the other version of pool 1 may read what this one may not
        for hot in (1, 2):
            key[owner_of_hot[hot]][:, rank[hot] < 0] = torch.nan
            value[owner_of_hot[hot]][:, rank[hot] < 0] = torch.nan
        angles = torch.arange(slots + 1)[:, None] * 0.3 ** torch.arange(head_dim // 2)
        return cls(
            reads,
            normal(len(reads), kv_heads * group, head_dim),
            key,
            value,
            rank,
            torch.cat([angles.cos(), angles.cos()], -1).to(device, dtype),
            torch.cat([-angles.sin(), angles.sin()], -1).to(device, dtype),
            normal(CACHE_ROWS, kv_heads, head_dim),
            normal(CACHE_ROWS, kv_heads, head_dim),
            torch.randint(CACHE_ROWS, (max(r[2] for r in reads) + 1, 13), generator=generator).to(device),
            PlanShape(len(reads) + 2, workers, tile_rows, group, STEP),
        )

    @property
    def hot_key(self) -> Tensor:
        slot = torch.tensor([1, 2, 0, 1], device=self.key.device)
        # a poisoned spare slot must not reach the reference, which turns all of them
        source = self.key[slot].clone()
        out = torch.empty_like(source)
        rotate_pool(source, self.rank, self.cos, self.sin, 1, out)
        return out

    @property
    def bias(self) -> Tensor:
        shown = torch.zeros(self.rank.shape, dtype=self.query.dtype, device=self.rank.device)
        return shown.masked_fill_(self.rank < 0, -torch.inf)

    def plan(self, reads: Reads | None = None) -> Plan:
        plan = Plan.allocate(self.shape, "cpu")
        hot, slot, table, limit = zip(*(self.reads if reads is None else reads), strict=True)
        slots = self.rank.shape[1]
        tables = (self.table.shape[0], self.table.shape[1])
        plan.fill(hot, slot, table, limit, pool_slots=slots, pools=(4, 3), tables=tables)
        return Plan(self.shape, plan.buffer.to(self.query.device))

    def run(self, *, rotating: bool = False, **changes: Any) -> Tensor:
        scratch = Scratch.allocate(self.shape, self.value.shape[1], self.query.shape[2], self.query.device)
        scratch.partial.fill_(torch.nan)
        scratch.normaliser.fill_(torch.nan)
        out = torch.full_like(self.query, torch.nan)
        arguments: dict[str, Any] = {
            "query": self.query,
            "key": self.key if rotating else self.hot_key,
            "value": self.value,
            "bias": None if rotating else self.bias,
            "cache_key": self.cache_key,
            "cache_value": self.cache_value,
            "table": self.table,
            "plan": changes.pop("plan", None) or self.plan(),
            "scratch": scratch,
            "out": out,
            "rotation": Rotation(self.rank, self.cos, self.sin, 1) if rotating else None,
            "compiled": Tuning(STEP, 4, 3),
        }
        memory_attention(**(arguments | changes))
        return out

    def expected(self) -> Tensor:
        hot, slot, table, limit = (list(x) for x in zip(*self.reads, strict=True))
        hidden = (self.query, self.hot_key, self.value)
        query, key, value = (t.double() for t in hidden)
        cache = self.cache_key.double(), self.cache_value.double()
        return reference(query, key, value, self.rank >= 0, *cache, self.table, hot, slot, table, limit)

    def check(self, *, rotating: bool = False, tolerance: float = 2e-6) -> None:
        out = self.run(rotating=rotating)
        torch.testing.assert_close(out.double(), self.expected(), atol=tolerance, rtol=tolerance)


def eight_bit(case: Case) -> tuple[Case, dict[str, Any]]:
    """The case with pools that 8 bits hold without loss, and what its kernel is given.

    Tokens are of very different sizes, and so are channels, so that a scale at the wrong place shows.
    """
    generator = torch.Generator().manual_seed(1)
    kv_heads, _, head_dim = case.key.shape[1:]
    channel = torch.rand(kv_heads, head_dim, generator=generator) * 0.02 + 0.001
    token = torch.rand(case.value.shape[:-1], generator=generator) * 0.02 + 0.001
    poisoned = case.key.isnan()[..., 0]
    key, value = (
        torch.randint(-127, 128, case.key.shape, generator=generator, dtype=torch.int8) for _ in range(2)
    )
    key, value, channel, token = (t.to(case.key.device) for t in (key, value, channel, token))
    exact = replace(
        case,
        key=(key * channel[:, None]).to(case.key.dtype),
        value=(value * token[..., None]).to(case.key.dtype),
    )
    token[poisoned] = torch.nan
    rotation = Rotation(case.rank, case.cos, case.sin, 1, channel, token)
    return exact, {"key": key, "value": value, "rotation": rotation}
