"""Random pools, contexts and queries at a model's shape: what the attention benchmark reads."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.hot_copy import write_hot_copy
from kernels.quantise import key_scale


@dataclass(frozen=True)
class Shape:
    """A model's attention; ``pools`` lie in memory whatever the tenants, so many that no cache holds them."""

    pools: int = 32
    kv_heads: int = 8
    group: int = 4
    head_dim: int = 128
    pool: int = 12_800
    block: int = 256
    context: int = 64

    @property
    def slots(self) -> int:
        return self.pool + self.block

    def layers(self, tenants: int) -> int:
        """Layers, taken in turn, that make up the pools of so many tenants."""
        return max(1, self.pools // tenants)


@dataclass(frozen=True)
class Data:
    """Tensors for ``tenants`` with ``sequences`` each.

    ``key`` and ``value`` [L, T, H_kv, N + K, d_head] are NaN in the spare slots, where ``rank`` [L, T, N + K] is -1: a
    read of one shows. ``scale`` is what 8-bit keys are kept by.
    """

    shape: Shape
    query: Tensor
    key: Tensor
    hot_key: Tensor
    value: Tensor
    rank: Tensor
    bias: Tensor
    scale: Tensor
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
        rows, layers = tenants * sequences, shape.layers(tenants)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, dtype=dtype, device=device)

        pools = (layers, tenants, shape.kv_heads, shape.slots, shape.head_dim)
        key, value = normal(*pools), normal(*pools)
        rank = torch.rand(layers, tenants, shape.slots, device=device).argsort(dim=-1).int()
        rank[rank >= shape.pool] = -1
        scale = torch.stack([key_scale(of_layer.transpose(0, 1).flatten(1, 2)) for of_layer in key])
        for tensor in (key, value):
            tensor.masked_fill_((rank < 0)[:, :, None, :, None], torch.nan)
        inverse = 5e5 ** (-torch.arange(0, shape.head_dim, 2, device=device) / shape.head_dim) / 1.8125
        angles = torch.arange(shape.slots + 1, device=device)[:, None] * inverse
        cos = torch.cat([angles.cos()] * 2, -1).to(dtype)
        sin = torch.cat([-angles.sin(), angles.sin()], -1).to(dtype)
        bias = torch.zeros(rank.shape, dtype=dtype, device=device).masked_fill_(rank < 0, -torch.inf)
        cache = (layers, rows * shape.context, shape.kv_heads, shape.head_dim)
        table = torch.arange(rows * shape.context, dtype=torch.int32, device=device).view(rows, -1)
        return cls(
            shape=shape,
            query=normal(layers, rows, shape.kv_heads * shape.group, shape.head_dim),
            key=key,
            hot_key=hot_copies(key, rank, cos, sin),
            value=value,
            rank=rank,
            bias=bias,
            scale=scale,
            cos=cos,
            sin=sin,
            cache_key=normal(*cache),
            cache_value=normal(*cache),
            table=table,
            owner=[row // sequences for row in range(rows)],
        )

    @property
    def layers(self) -> int:
        return self.key.shape[0]

    @property
    def tenants(self) -> int:
        return self.key.shape[1]

    def first_sequence(self) -> Data:
        """The same pools, read by the first of the sequences alone."""
        return replace(self, query=self.query[:, :1].contiguous(), table=self.table[:1], owner=self.owner[:1])

    def gathered(self, pools: Tensor) -> Tensor:
        """``pools`` as ``key``, without the spare slots and in the order of ranks: [L, T, H_kv, N, d_head]."""
        # a spare slot's -1 sorts first
        held = self.rank.argsort(dim=-1)[..., self.shape.block :]
        at = held[:, :, None, :, None].expand(-1, -1, pools.shape[2], -1, pools.shape[-1])
        return pools.gather(3, at)


def hot_copies(key: Tensor, rank: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotated copies of all pools."""
    out = torch.empty_like(key)
    for tenant in range(key.shape[1]):
        write_hot_copy(key[:, tenant], rank[:, tenant].contiguous(), cos, sin, 1, out[:, tenant])
    return out
