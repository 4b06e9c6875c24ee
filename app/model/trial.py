"""A trial of a device's operations before they serve: each runs once at the model's shape, beside torch.

What a compiler, a driver or a GPU nobody has tried does wrong shows here, and not in an answer.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from app.model.batch import ContextCache, Reading
from app.model.config import ModelConfig
from app.model.operations import Operations
from app.model.pools import Pools
from app.model.rope import RopeTable
from app.model.torch_operations import TorchOperations
from kernels.quantise import key_scale

_PROMPT = 5
# of values that are averages of unit normals, and of projections of unit variance
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 6e-2}


class Wrong(RuntimeError):
    """An operation's results are not torch's; the message names it."""


def try_out(
    operations: Operations, config: ModelConfig, rope: RopeTable, dtype: torch.dtype, device: torch.device
) -> None:
    """Raises Wrong, and whatever launching a kernel raises. Takes the room of a few pools of one layer."""
    one = replace(config, num_layers=1)
    twin = TorchOperations(one, rope, dtype, device, eight_bit=operations.form.eight_bit)
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    width, rows = config.hidden_size, 2 * config.num_kv_heads * config.head_dim
    weight, norm = normal(rows, width) * width**-0.5, torch.ones(width, dtype=dtype, device=device)
    hidden = normal(config.num_tokens, width)
    slots = torch.randperm(config.pool_slots, generator=generator)
    written = [
        torch.zeros(config.num_kv_heads, config.pool_slots, config.head_dim, dtype=dtype, device=device)
        for _ in range(4)
    ]
    for each, pair in ((operations, written[:2]), (twin, written[2:])):
        each.write(hidden, norm, weight, None, slots[: config.num_tokens], *pair)
    _compare("writing a block", written[:2], written[2:])

    rank = slots.to(torch.int32)[None]
    rank = torch.where(rank >= config.pool_size, -1, rank)
    pool = [normal(1, config.num_kv_heads, config.pool_slots, config.head_dim) for _ in range(2)]
    cache = ContextCache.allocate(one, 2 * _PROMPT + 1, dtype, device)
    cache.key[:], cache.value[:] = normal(*cache.key.shape), normal(*cache.value.shape)
    query = normal(1 + _PROMPT, config.num_heads, config.head_dim)
    tables = torch.arange(1, 2 * _PROMPT + 1).view(2, _PROMPT)
    readings = [Reading(slice(0, 1), 0, 0, tables[0], 3), Reading(slice(1, 1 + _PROMPT), 0, 0, tables[1], 5)]
    found = []
    for each in (operations, twin):
        scale = key_scale(pool[0]) if each.form.eight_bit else None
        pools = Pools.allocate(one, 1, 1, dtype, device, each.form, scale)
        pools.put(0, slice(0, config.pool_slots), *pool)
        each.make_readable(pools, 0, rank, 0)
        out = query.new_zeros(1 + _PROMPT, config.num_heads * config.head_dim)
        each.prepare(readings, 1)(0, query, pools, cache, out)
        found.append(out)
    _compare("reading a pool", found[:1], found[1:])

    own = normal(2, config.num_kv_heads, 2 * _PROMPT, config.head_dim)
    asked = query[1:].expand(2, *query[1:].shape)
    causal = [each.attend_causally(asked, own, own) for each in (operations, twin)]
    _compare("a self-update's attention", causal[:1], causal[1:])


def _compare(name: str, found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        error = float((a.float() - b.float()).abs().max())
        # a NaN compares as wrong
        if not error <= _TOLERANCE[a.dtype]:
            raise Wrong(f"{name} differs from torch's by {error:.3g}")
