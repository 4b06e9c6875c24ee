"""The memory's operations in torch: the form for CPUs, and the definition of what the kernels compute."""

from __future__ import annotations

import torch
from torch import Tensor

from app.model.batch import Reading
from app.model.config import ModelConfig
from app.model.pools import PoolForm, Pools
from app.model.rope import RopeTable
from app.model.torch_reads import Reads, causal_bias
from kernels.attention import pack_heads, partial_attention, unpack_heads
from kernels.gate import swiglu
from kernels.norm import add_rms_norm
from kernels.rotate import angles_by_channel, rotate_pool, rotate_pool_by_channel, rotate_rows
from kernels.update_write import project_memory


class TorchOperations:
    """See ``app.model.operations.Operations``."""

    def __init__(
        self,
        config: ModelConfig,
        rope: RopeTable,
        dtype: torch.dtype,
        device: torch.device,
        *,
        eight_bit: bool = False,
    ) -> None:
        # torch cannot attend to 8-bit tensors: what is being read is copied whole
        by_channel = device.type == "cpu" and dtype == torch.float32
        self.form = PoolForm(eight_bit=eight_bit, value_copies=eight_bit, by_channel=by_channel)
        self._config, self._rope, self._dtype, self._device = config, rope, dtype, device
        self._angles = angles_by_channel(rope.cos, rope.sin) if by_channel else None

    def add_norm(self, x: Tensor, delta: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
        return add_rms_norm(x, delta, weight, self._config.rms_norm_eps)

    def place(
        self,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        write_rows: Tensor,
        cache_key: Tensor,
        cache_value: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return rotate_rows(qkv, cos, sin, write_rows, cache_key, cache_value)

    def gate(self, gate_up: Tensor) -> Tensor:
        return swiglu(gate_up)

    def prepare(self, readings: list[Reading], decode: int) -> Reads:
        by_channel = self.form.by_channel
        return Reads(self._config, readings, decode, self._dtype, self._device, by_channel=by_channel)

    def attend_causally(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows = query.shape[1]
        output, _ = partial_attention(
            pack_heads(query, self._config.num_kv_heads),
            key,
            value,
            causal_bias(self._config, rows, key.shape[2], self._dtype, self._device),
        )
        return unpack_heads(output, rows)

    def make_readable(self, pools: Pools, slot: int, rank: Tensor, hot: int) -> None:
        assert pools.hot_key is not None
        assert pools.bias is not None
        rope, first = self._rope, self._config.first_rank_position
        # as floats, a whole pool of 8 bits would take several times its room
        at_once = 1 if self.form.eight_bit else self._config.num_layers
        for layer in range(0, self._config.num_layers, at_once):
            layers = slice(layer, layer + at_once)
            key, value = pools.whole(slot, self._dtype, layers)
            ranks, copy = rank[layers], pools.hot_key[layers, hot]
            if self._angles is None:
                rotate_pool(key, ranks, rope.cos, rope.sin, first, copy)
            else:
                rotate_pool_by_channel(key.transpose(2, 3), ranks, self._angles, first, copy)
            if pools.hot_value is not None:
                pools.hot_value[layers, hot] = value
        hidden = torch.zeros(rank.shape, dtype=self._dtype).masked_fill_(rank < 0, -torch.inf)
        pools.bias[:, hot] = hidden.to(self._device)

    def prepare_slots(self, slots: Tensor, pool_slots: int) -> Tensor:
        # torch looks at each index itself
        return slots.to(self._device)

    def write(
        self,
        hidden: Tensor,
        norm: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        slots: Tensor,
        key: Tensor,
        value: Tensor,
    ) -> None:
        c = self._config
        # always in pieces of K rows, so that a pool read back gives the bits its blocks gave one by one
        keys, values = project_memory(
            hidden, norm, c.rms_norm_eps, weight, bias, c.num_kv_heads, c.num_tokens
        )
        key.index_copy_(1, slots, keys)
        value.index_copy_(1, slots, values)

    def write_blocks(
        self,
        hidden: Tensor,
        norm: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        pools: list[int],
        slots: Tensor,
        key: Tensor,
        value: Tensor,
    ) -> None:
        c = self._config
        count, tokens, _ = hidden.shape
        keys, values = project_memory(
            hidden.flatten(0, 1), norm, c.rms_norm_eps, weight, bias, c.num_kv_heads, c.num_tokens
        )
        at = torch.tensor(pools)[:, None].to(key.device), slice(None), slots
        for target, projected in ((key, keys), (value, values)):
            # [B, K, H_kv, d_head]
            target[at] = projected.view(c.num_kv_heads, count, tokens, c.head_dim).permute(1, 2, 0, 3)
