"""Attention over a memory pool and a context: partial results joined by their log-sum-exp.

Rows of queries are packed: the query heads that share a K/V head, and the sequences that share a pool, lie
side by side, so that every key is read once for all of them. This module is the torch form; it serves CPUs
and defines what a device kernel must compute.
"""

from __future__ import annotations

import torch
from torch import Tensor


def partial_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Softmax attention with its normaliser.

    ``query`` [B, H_kv, M, d_head], ``key``/``value`` [B, H_kv, S, d_head], ``bias`` additive, broadcastable
    to [B, H_kv, M, S] (-inf hides a key; no row may be hidden whole). Returns the output, shaped as
    ``query``, and the log-sum-exp [B, H_kv, M] in float32.
    """
    if query.device.type == "cpu":
        if bias is not None:
            bias = bias.expand(query.shape[0], 1, query.shape[2], key.shape[2])
        output, normaliser = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, False, attn_mask=bias
        )
        return output, normaliser
    scores = (query.float() @ key.float().transpose(-1, -2)) * query.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias
    normaliser = scores.logsumexp(dim=-1)
    output = ((scores - normaliser[..., None]).exp() @ value.float()).to(query.dtype)
    return output, normaliser


def merge(
    first: Tensor, first_normaliser: Tensor, second: Tensor, second_normaliser: Tensor
) -> tuple[Tensor, Tensor]:
    """Joins two partial attentions over disjoint keys: outputs [..., d_head], normalisers [...]."""
    weight = torch.sigmoid(first_normaliser - second_normaliser)[..., None].to(first.dtype)
    return torch.lerp(second, first, weight), torch.logaddexp(first_normaliser, second_normaliser)


def pack_heads(query: Tensor, num_kv_heads: int) -> Tensor:
    """[B, T, H, d_head] -> [B, H_kv, G * T, d_head]; row g * T + t is token t of the group's head g."""
    batch, tokens, heads, head_dim = query.shape
    group = heads // num_kv_heads
    return (
        query.view(batch, tokens, num_kv_heads, group, head_dim)
        .permute(0, 2, 3, 1, 4)
        .reshape(batch, num_kv_heads, group * tokens, head_dim)
    )


def unpack_heads(output: Tensor, tokens: int) -> Tensor:
    """The inverse of ``pack_heads``: [B, H_kv, G * T, d_head] -> [B, T, H * d_head]."""
    batch, kv_heads, rows, head_dim = output.shape
    group = rows // tokens
    return (
        output.view(batch, kv_heads, group, tokens, head_dim)
        .permute(0, 3, 1, 2, 4)
        .reshape(batch, tokens, kv_heads * group * head_dim)
    )
