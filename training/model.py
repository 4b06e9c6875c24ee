"""The pocket model as it is trained: the two passes of MemoryLLM (arXiv 2402.04624, section 3) over whole batches.

B contexts are written at once and G memory pools are read at once; both passes compute exactly what serving computes
one context and one pool at a time. Weights of all layers are stacked, so that one cast and one optimizer call serve
them all; `training.published` takes them apart into the published checkpoint layout.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.packing import Packing, place

DTYPES = ("auto", "bfloat16", "float32")


def compute_dtype(name: str) -> torch.dtype:
    """One of DTYPES; "auto" is bf16 where the default device multiplies it: on other CPUs it is ten times as slow as
    fp32."""
    cpu = torch.cpu.get_capabilities()
    quick = cpu.get("avx512_bf16") or cpu.get("amx_bf16")
    if torch.get_default_device().type == "cuda":
        quick = torch.cuda.is_bf16_supported()
    return torch.bfloat16 if name == "bfloat16" or (name == "auto" and quick) else torch.float32


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the model; `num_tokens` is K and `num_blocks * num_tokens` is N."""

    vocab_size: int = 2560
    hidden_size: int = 192
    num_layers: int = 4
    num_heads: int = 3
    intermediate_size: int = 512
    num_tokens: int = 16
    num_blocks: int = 50
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def pool_size(self) -> int:
        return self.num_blocks * self.num_tokens

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class _RMSNorm(torch.autograd.Function):
    """RMSNorm in few passes over memory; statistics in fp32, output in the compute dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = scale.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        normed = (x * scale).to(dtype)
        ctx.save_for_backward(normed, scale, weight)
        scaled: Tensor = normed * weight.to(dtype)
        return scaled

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        normed, scale, weight = ctx.saved_tensors
        grad_weight = (grad * normed).flatten(0, -2).sum(0, dtype=torch.float32)
        grad = grad * weight.to(grad.dtype)
        along = (grad * normed).mean(-1, keepdim=True, dtype=torch.float32)
        grad_x: Tensor = torch.addcmul(grad.float(), normed.float(), along, value=-1.0).mul_(scale)
        return grad_x, grad_weight, None, None


def rope_tables(positions: Tensor, head_size: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [..., head_size] for integer positions [...]; sin carries the sign of the rotated half."""
    frequencies = 1.0 / theta ** (torch.arange(0, head_size, 2, dtype=torch.float32) / head_size)
    angles = positions.float()[..., None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype)


def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate x [..., head_size] in Llama's half-split layout."""
    cos, sin = tables
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


@dataclass
class LayerWeights:
    """One layer's weights in the compute dtype; norms stay fp32."""

    query_key_value: Tensor
    output: Tensor
    gate_up: Tensor
    down: Tensor
    input_norm: Tensor
    post_norm: Tensor
    bos: Tensor


class MemoryModel(nn.Module):
    """The parameters and both passes. `dtype` is the compute dtype of the matrix products."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype
        layers, d, ff = config.num_layers, config.hidden_size, config.intermediate_size

        def matrix(rows: int, columns: int, gain: float) -> nn.Parameter:
            return nn.Parameter(torch.randn(layers, rows, columns) * gain / math.sqrt(columns))

        self.q_proj, self.k_proj, self.v_proj = (matrix(d, d, 0.8) for _ in range(3))
        self.o_proj = matrix(d, d, 0.4)
        self.gate_proj, self.up_proj = matrix(ff, d, 0.8), matrix(ff, d, 0.8)
        self.down_proj = matrix(d, ff, 0.4)
        self.input_norm, self.post_norm = (
            nn.Parameter(torch.ones(layers, d)),
            nn.Parameter(torch.ones(layers, d)),
        )
        self.norm = nn.Parameter(torch.ones(d))
        self.embedding = nn.Parameter(torch.randn(config.vocab_size, d) * 0.05)
        self.bos_embedding = nn.Parameter(torch.randn(layers, 1, d) * 0.02)
        self.new_memory_positional_emb = nn.Parameter(torch.zeros(1, 1, d))
        self.initial_block = nn.Parameter(torch.randn(layers, config.num_tokens, d) * 0.02)

    def layer_weights(self) -> list[LayerWeights]:
        """Cast and unstack the weights once; both passes of a training step share them."""
        to = self.dtype
        stacks = (
            torch.cat([self.q_proj, self.k_proj, self.v_proj], 1).to(to).unbind(0),
            self.o_proj.to(to).unbind(0),
            torch.cat([self.gate_proj, self.up_proj], 1).to(to).unbind(0),
            self.down_proj.to(to).unbind(0),
            self.input_norm.unbind(0),
            self.post_norm.unbind(0),
            self.bos_embedding.unbind(0),
        )
        return [LayerWeights(*tensors) for tensors in zip(*stacks, strict=True)]

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        normed: Tensor = _RMSNorm.apply(x, weight, self.config.rms_norm_eps, self.dtype)  # type: ignore[no-untyped-call]
        return normed

    def _tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return rope_tables(positions, self.config.head_size, self.config.rope_theta, self.dtype)

    def _mlp(self, h: Tensor, layer: LayerWeights) -> Tensor:
        gate, up = F.linear(self._norm(h, layer.post_norm), layer.gate_up).chunk(2, -1)
        return h + F.linear(F.silu(gate) * up, layer.down)

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and tied head: hidden [..., d] → fp32 logits [..., vocab]."""
        return F.linear(self._norm(hidden, self.norm), self.embedding.to(self.dtype)).float()

    def write(
        self, ids: Tensor, lengths: Tensor, tail: Tensor, layers: list[LayerWeights] | None = None
    ) -> Tensor:
        """Self-update of B contexts.

        ids: int64 [B, Q], each context right-aligned, Q >= num_tokens. lengths: int64 [B]. tail: [L, B, K, d], the
        newest block each context sees. Returns the new blocks [L, B, K, d], fp32.

        A context of T < K tokens has the last K - T tail rows queried too; they stand in the same right-aligned
        rows before the context, are refilled from the tail at every layer, and leave the tail's own keys.
        """
        config, k_tokens = self.config, self.config.num_tokens
        batch, rows = ids.shape
        heads, size, d = config.num_heads, config.head_size, config.hidden_size
        layers = layers or self.layer_weights()
        row = torch.arange(rows)
        offset = row[None] - (rows - lengths[:, None])  # place in the context, negative before it
        alive = row[None] >= rows - lengths.clamp(min=k_tokens)[:, None]
        packing = Packing(alive)
        offset = offset.flatten()[packing.taken]
        refilled = (offset < 0).nonzero()[:, 0]
        refill_from = (
            (torch.arange(batch)[:, None] * k_tokens + k_tokens).expand(-1, rows).flatten()[packing.taken]
        )
        refill_from = (refill_from + offset)[refilled]
        is_new = (row >= rows - k_tokens).expand(batch, -1).flatten()[packing.taken]
        newest = Packing(is_new)

        tail_tables = self._tables(torch.arange(1 + k_tokens)[:, None])
        tables = self._tables(1 + k_tokens + offset[:, None])
        causal = (row[None] <= row[:, None])[None] & alive[:, None]
        tail_alive = torch.arange(-1, k_tokens)[None] < lengths[:, None]
        mask = torch.cat([tail_alive[:, None].expand(-1, rows, -1), causal], 2)[:, None]
        bias = torch.zeros(mask.shape, dtype=self.dtype).masked_fill_(~mask, -1e9)

        h = F.embedding(ids.flatten()[packing.taken], self.embedding)
        marker = is_new[:, None] * self.new_memory_positional_emb[0]
        blocks = []
        for index, layer in enumerate(layers):
            if len(refilled):
                h = h.index_copy(0, refilled, tail[index].reshape(-1, d)[refill_from])
            h = h + marker
            before = torch.cat([layer.bos[None].expand(batch, 1, d), tail[index]], 1)
            before = F.linear(self._norm(before, layer.input_norm), layer.query_key_value[d:])
            before_k, before_v = before.view(batch, 1 + k_tokens, 2, heads, size).unbind(2)
            own = F.linear(self._norm(h, layer.input_norm), layer.query_key_value).view(-1, 3, heads, size)
            own = torch.stack(
                [rotate(own[:, 0], tables) * size**-0.5, rotate(own[:, 1], tables), own[:, 2]], 1
            )
            q, k, v = packing.pad(own.flatten(1)).view(batch, rows, 3, heads, size).unbind(2)
            k = torch.cat([rotate(before_k, tail_tables), k], 1).permute(0, 2, 3, 1)
            v = torch.cat([before_v, v], 1).transpose(1, 2)
            out = (q.transpose(1, 2) @ k + bias).softmax(-1) @ v
            out = packing.take(out.transpose(1, 2).reshape(batch * rows, d))
            h = self._mlp(h + F.linear(out, layer.output), layer)
            blocks.append(newest.take(h).view(batch, k_tokens, d))
        return torch.stack(blocks)

    def project(
        self, pool: Tensor, layers: list[LayerWeights] | None = None, ranks: Tensor | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """Keys (rotated to their ranks) [G, H, size, 1 + M] and values [G, H, 1 + M, size] of bos and pool, by layer.

        pool: [L, G, M, d], the newest M <= N ranks. Or, with ranks int64 [L, G, M], a bank of blocks [L, G, C, d]:
        rank i of the pool then holds the bank's row ranks[.., i]. Each row is projected once, however often the
        initial block, the last K rows of the bank, is repeated.
        """
        config = self.config
        groups, rows, d = pool.shape[1:]
        newest = rows if ranks is None else ranks.shape[2]
        positions = torch.arange(config.pool_size - newest, config.pool_size) + 1
        tables = self._tables(torch.cat([torch.zeros(1), positions])[:, None])
        projected = []
        for index, layer in enumerate(layers or self.layer_weights()):
            seen = torch.cat([layer.bos[None].expand(groups, 1, d), pool[index]], 1)
            seen = F.linear(self._norm(seen, layer.input_norm), layer.query_key_value[d:])
            if ranks is not None:
                seen = place(seen, F.pad(ranks[index] + 1, (1, 0)), config.num_tokens)
            k, v = seen.view(groups, 1 + newest, 2, config.num_heads, config.head_size).unbind(2)
            projected.append((rotate(k, tables).permute(0, 2, 3, 1), v.transpose(1, 2)))
        return projected

    def read(
        self,
        ids: Tensor,
        lengths: Tensor,
        memory: list[tuple[Tensor, Tensor]],
        layers: list[LayerWeights] | None = None,
    ) -> Tensor:
        """Decode R rows of tokens against each of G pools.

        ids: int64 [G, R, T], left-aligned. lengths: int64 [G, R]. memory: what `project` made of the pools.
        Returns the hidden states of the rows' real tokens one row after the other, [sum(lengths), d].
        """
        config = self.config
        groups, rows, length = ids.shape
        heads, size, d = config.num_heads, config.head_size, config.hidden_size
        layers = layers or self.layer_weights()
        place = torch.arange(length)
        packing = Packing(place < lengths[..., None])
        tables = self._tables(
            config.pool_size + 1 + place.expand(ids.shape).flatten()[packing.taken][:, None]
        )
        bias = torch.full((length, length), -1e9, dtype=self.dtype).triu(1)

        h = F.embedding(ids.flatten()[packing.taken], self.embedding)
        for layer, (memory_k, memory_v) in zip(layers, memory, strict=True):
            newest = memory_v.shape[2]
            own = F.linear(self._norm(h, layer.input_norm), layer.query_key_value).view(-1, 3, heads, size)
            own = torch.stack(
                [rotate(own[:, 0], tables) * size**-0.5, rotate(own[:, 1], tables), own[:, 2]], 1
            )
            padded = packing.pad(own.flatten(1)).view(groups, rows, length, 3, heads, size)
            q, k, v = padded.permute(3, 0, 4, 1, 2, 5)
            to_memory = q.reshape(groups, heads, rows * length, size) @ memory_k
            to_own = q @ k.transpose(-1, -2) + bias
            scores = torch.cat([to_memory.view(groups, heads, rows, length, -1), to_own], -1).softmax(-1)
            from_memory = scores[..., :newest].reshape(groups, heads, rows * length, newest) @ memory_v
            out = from_memory.view(groups, heads, rows, length, size) + scores[..., newest:] @ v
            out = packing.take(out.permute(0, 2, 3, 1, 4).reshape(-1, d))
            h = self._mlp(h + F.linear(out, layer.output), layer)
        return h

    def initial_pool(self, groups: int) -> Tensor:
        """The pool every tenant starts from: the learned block repeated, [L, G, N, d]."""
        pool = self.initial_block.repeat(1, self.config.num_blocks, 1)
        return pool[:, None].expand(-1, groups, -1, -1)
