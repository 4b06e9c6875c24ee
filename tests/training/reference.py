"""MemoryLLM's two passes for one context and one pool, written as plainly as the definition reads."""

import torch
import torch.nn.functional as F
from torch import Tensor

from training.model import MemoryModel


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * weight


def _rope(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    size = x.shape[-1]
    angles = positions[:, None].float() * theta ** (-torch.arange(0, size, 2).float() / size)
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def _layer(model: MemoryModel, layer: int, rows: Tensor, queries: int) -> Tensor:
    """Outputs of the last `queries` of `rows` [n, d]; row i has position i and sees the rows up to itself."""
    c = model.config
    x = _norm(rows, model.input_norm[layer], c.rms_norm_eps)
    positions = torch.arange(len(rows))

    def heads(matrix: Tensor) -> Tensor:
        return (x @ matrix.T).view(len(rows), c.num_heads, c.head_size).transpose(0, 1)

    q, k = (_rope(heads(m[layer]), positions, c.rope_theta) for m in (model.q_proj, model.k_proj))
    scores = q @ k.transpose(1, 2) / c.head_size**0.5
    scores = scores.masked_fill(positions[None] > positions[:, None], float("-inf"))
    mixed = (
        (scores.softmax(-1) @ heads(model.v_proj[layer])).transpose(0, 1).reshape(len(rows), -1)[-queries:]
    )
    h = rows[-queries:] + mixed @ model.o_proj[layer].T
    y = _norm(h, model.post_norm[layer], c.rms_norm_eps)
    return (
        h + (F.silu(y @ model.gate_proj[layer].T) * (y @ model.up_proj[layer].T)) @ model.down_proj[layer].T
    )


def write(model: MemoryModel, ids: list[int], tail: Tensor) -> Tensor:
    """Self-update: tail [L, K, d] → the new block [L, K, d]."""
    k_tokens = model.config.num_tokens
    h = model.embedding[ids]
    block = []
    for layer in range(model.config.num_layers):
        rows = torch.cat([model.bos_embedding[layer], tail[layer], h])
        rows = torch.cat([rows[:-k_tokens], rows[-k_tokens:] + model.new_memory_positional_emb[0]])
        out = _layer(model, layer, rows, max(len(ids), k_tokens))
        block.append(out[-k_tokens:])
        h = out[-len(ids) :]
    return torch.stack(block)


def read(model: MemoryModel, ids: list[int], pool: Tensor) -> Tensor:
    """Hidden states [T, d] of a prompt read against pool [L, N, d]."""
    h = model.embedding[ids]
    for layer in range(model.config.num_layers):
        h = _layer(model, layer, torch.cat([model.bos_embedding[layer], pool[layer], h]), len(ids))
    return h


def forget(pool: Tensor, block: Tensor, seed: int, version: int) -> Tensor:
    """The pool [L, N, d] after dropping K random ranks a layer and appending the block."""
    layers, size, _ = pool.shape
    draw = torch.Generator().manual_seed(seed * 1_000_003 + version)
    kept = []
    for layer in range(layers):
        order = torch.randperm(size, generator=draw)
        kept.append(torch.cat([pool[layer, order[: size - block.shape[1]].sort().values], block[layer]]))
    return torch.stack(kept)
