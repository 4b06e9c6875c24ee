"""The pocket model as it is trained: the two passes of MemoryLLM (arXiv 2402.04624, section 3) over whole batches.

B contexts are written at once and G memory pools are read at once; both passes compute exactly what serving computes
one context and one pool at a time. Weights of all layers are stacked, so that one cast and one optimizer call serve
them all; `training.export` takes them apart into the published checkpoint layout.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
        return normed * weight.to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        normed, scale, weight = ctx.saved_tensors
        grad_weight = (grad * normed).flatten(0, -2).sum(0, dtype=torch.float32)
        grad = grad * weight.to(grad.dtype)
        along = (grad * normed).mean(-1, keepdim=True, dtype=torch.float32)
        return torch.addcmul(grad.float(), normed.float(), along, value=-1.0).mul_(scale), grad_weight, None, None


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

    query: Tensor
    key_value: Tensor
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
        self.input_norm, self.post_norm = nn.Parameter(torch.ones(layers, d)), nn.Parameter(torch.ones(layers, d))
        self.norm = nn.Parameter(torch.ones(d))
        self.embedding = nn.Parameter(torch.randn(config.vocab_size, d) * 0.05)
        self.bos_embedding = nn.Parameter(torch.randn(layers, 1, d) * 0.02)
        self.new_memory_positional_emb = nn.Parameter(torch.zeros(1, 1, d))
        self.initial_block = nn.Parameter(torch.randn(layers, config.num_tokens, d) * 0.02)

    def layer_weights(self) -> list[LayerWeights]:
        """Cast and unstack the weights once; both passes of a training step share them."""
        to = self.dtype
        stacks = (
            self.q_proj.to(to).unbind(0),
            torch.cat([self.k_proj, self.v_proj], 1).to(to).unbind(0),
            self.o_proj.to(to).unbind(0),
            torch.cat([self.gate_proj, self.up_proj], 1).to(to).unbind(0),
            self.down_proj.to(to).unbind(0),
            self.input_norm.unbind(0),
            self.post_norm.unbind(0),
            self.bos_embedding.unbind(0),
        )
        return [LayerWeights(*tensors) for tensors in zip(*stacks, strict=True)]

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return _RMSNorm.apply(x, weight, self.config.rms_norm_eps, self.dtype)  # type: ignore[no-any-return]

    def _mlp(self, h: Tensor, layer: LayerWeights) -> Tensor:
        gate, up = F.linear(self._norm(h, layer.post_norm), layer.gate_up).chunk(2, -1)
        return h + F.linear(F.silu(gate) * up, layer.down)

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and tied head: hidden [..., d] → fp32 logits [..., vocab]."""
        return F.linear(self._norm(hidden, self.norm), self.embedding.to(self.dtype)).float()

    def write(self, ids: Tensor, lengths: Tensor, tail: Tensor, layers: list[LayerWeights] | None = None) -> Tensor:
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
        in_context = offset >= 0
        alive = row[None] >= rows - lengths.clamp(min=k_tokens)[:, None]
        short = bool((lengths < k_tokens).any())
        tail_row = (offset + k_tokens).clamp(0, k_tokens - 1)[..., None].expand(-1, -1, d)
        tail_alive = torch.arange(k_tokens)[None] < lengths[:, None]

        before = rope_tables(torch.arange(1 + k_tokens), size, config.rope_theta, self.dtype)
        here = rope_tables(1 + k_tokens + offset, size, config.rope_theta, self.dtype)
        tables = tuple(
            torch.cat([a.expand(batch, -1, -1), b], 1)[:, None] for a, b in zip(before, here, strict=True)
        )
        query_tables = tuple(table[:, :, 1 + k_tokens :] * size**-0.5 for table in tables)
        causal = (row[None] <= row[:, None])[None] & alive[:, None]
        fixed = torch.cat([torch.ones(batch, 1, dtype=torch.bool), tail_alive], 1)[:, None].expand(-1, rows, -1)
        mask = torch.cat([fixed, causal], 2)[:, None]
        bias = torch.zeros(mask.shape, dtype=self.dtype).masked_fill_(~mask, -1e9)

        h = F.embedding(ids, self.embedding)
        marker = F.pad(self.new_memory_positional_emb.expand(1, k_tokens, d), (0, 0, rows - k_tokens, 0))
        blocks = []
        for index, layer in enumerate(layers):
            if short:
                h = torch.where(in_context[..., None], h, tail[index].gather(1, tail_row))
            h = h + marker
            x = self._norm(torch.cat([layer.bos[None].expand(batch, 1, d), tail[index], h], 1), layer.input_norm)
            q = F.linear(x[:, 1 + k_tokens :], layer.query).view(batch, rows, heads, size).transpose(1, 2)
            keys_values = F.linear(x, layer.key_value).view(batch, -1, 2, heads, size).permute(2, 0, 3, 1, 4)
            q, k = rotate(q, query_tables), rotate(keys_values[0], tables)  # type: ignore[arg-type]
            weights = (q @ k.transpose(-1, -2) + bias).softmax(-1)
            out = (weights @ keys_values[1]).transpose(1, 2).reshape(batch, rows, d)
            h = self._mlp(h + F.linear(out, layer.output), layer)
            blocks.append(h[:, -k_tokens:])
        return torch.stack(blocks)

    def read(self, ids: Tensor, pool: Tensor, layers: list[LayerWeights] | None = None) -> Tensor:
        """Decode R rows of tokens against each of G pools.

        ids: int64 [G, R, T]. pool: [L, G, M, d], the newest M <= N ranks. Returns hidden states [G, R, T, d].
        """
        config = self.config
        groups, rows, length = ids.shape
        newest = pool.shape[2]
        heads, size, d = config.num_heads, config.head_size, config.hidden_size
        layers = layers or self.layer_weights()
        ranks = torch.arange(config.pool_size - newest, config.pool_size)
        pool_tables = rope_tables(torch.cat([torch.zeros(1), 1 + ranks]), size, config.rope_theta, self.dtype)
        token_tables = rope_tables(
            config.pool_size + 1 + torch.arange(length), size, config.rope_theta, self.dtype
        )
        query_tables = (token_tables[0] * size**-0.5, token_tables[1] * size**-0.5)
        bias = torch.full((length, length), -1e9, dtype=self.dtype).triu(1)

        h = F.embedding(ids, self.embedding)
        for index, layer in enumerate(layers):
            seen = torch.cat([layer.bos[None].expand(groups, 1, d), pool[index]], 1)
            memory = F.linear(self._norm(seen, layer.input_norm), layer.key_value)
            memory_k, memory_v = memory.view(groups, 1 + newest, 2, heads, size).permute(2, 0, 3, 1, 4)
            x = self._norm(h, layer.input_norm)
            q = F.linear(x, layer.query).view(groups, rows, length, heads, size).permute(0, 3, 1, 2, 4)
            own = F.linear(x, layer.key_value).view(groups, rows, length, 2, heads, size).permute(3, 0, 4, 1, 2, 5)
            q, own_k = rotate(q, query_tables), rotate(own[0], token_tables)
            memory_k = rotate(memory_k, pool_tables)
            flat_q = q.reshape(groups, heads, rows * length, size)
            to_memory = (flat_q @ memory_k.transpose(-1, -2)).view(groups, heads, rows, length, -1)
            scores = torch.cat([to_memory, q @ own_k.transpose(-1, -2) + bias], -1).softmax(-1)
            from_memory = scores[..., : 1 + newest].reshape(groups, heads, rows * length, -1) @ memory_v
            out = from_memory.view(groups, heads, rows, length, size) + scores[..., 1 + newest :] @ own[1]
            h = h + F.linear(out.permute(0, 2, 3, 1, 4).reshape(groups, rows, length, d), layer.output)
            h = self._mlp(h, layer)
        return h

    def initial_pool(self, groups: int) -> Tensor:
        """The pool every tenant starts from: the learned block repeated, [L, G, N, d]."""
        pool = self.initial_block.repeat(1, self.config.num_blocks, 1)
        return pool[:, None].expand(-1, groups, -1, -1)
