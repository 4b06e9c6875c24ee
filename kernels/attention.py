"""Attention over a memory pool and a context: partial results joined by their log-sum-exp.

Rows of queries are packed: the query heads that share a K/V head, and the sequences that share a pool, lie
side by side, so that every key is read once for all of them. This module is the torch form; it serves CPUs
and defines what a device kernel must compute.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels.linear import linear, streams

_LOG2_E = math.log2(math.e)
MANY_ROWS = 64
"""Query rows from which on a long pool is read by heads, see ``_many_rows``."""
_BLOCK_ROWS = 192
_MOST_SCORES = 2**24
"""Scores in float32 that exist at once where torch writes them out, on a device that is no CPU: 64 MiB of them."""


def partial_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Softmax attention with its normaliser.

    ``query`` [B, H_kv, M, d_head], ``key``/``value`` [B, H_kv, S, d_head], ``bias`` additive, broadcastable
    to [B, H_kv, M, S] (-inf hides a key; no row may be hidden whole). Returns the output, shaped as
    ``query``, and the log-sum-exp [B, H_kv, M] in float32.
    """
    if query.device.type == "cpu":
        per_key = bias is None or bias.shape[-2] == 1
        if per_key and query.shape[2] >= MANY_ROWS and streams(key[0, 0]):
            return _many_rows(query, key, value, bias)
        if bias is not None:
            bias = bias.expand(query.shape[0], 1, query.shape[2], key.shape[2])
        output, normaliser = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, False, attn_mask=bias
        )
        return output, normaliser
    return _written_out(query, key, value, bias)


def _written_out(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """``partial_attention`` by plain products, a block of query rows at a time: all scores of a prompt over a pool
    would be gigabytes."""
    batch, kv_heads, rows, head_dim = query.shape
    keys, values = key.float().transpose(-1, -2), value.float()
    output, normaliser = torch.empty_like(query), query.new_empty(query.shape[:-1], dtype=torch.float32)
    each = max(1, _MOST_SCORES // (batch * kv_heads * key.shape[2]))
    for start in range(0, rows, each):
        block = slice(start, start + each)
        scores = (query[:, :, block].float() @ keys).mul_(head_dim**-0.5)
        if bias is not None:
            scores += bias if bias.shape[-2] == 1 else bias[..., block, :]
        norm = scores.logsumexp(dim=-1)
        output[:, :, block] = scores.sub_(norm[..., None]).exp_() @ values
        normaliser[:, :, block] = norm
    return output, normaliser


def _many_rows(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """``partial_attention`` of a prompt over a pool on a CPU: a whole head's scores at once, ``bias`` by key.

    torch's own kernel works in tiles of 32 rows and 512 keys, which are too small for its BLAS when a pool
    is long; here the products are large, and only ``_BLOCK_ROWS`` rows of scores exist at a time. Scores are
    in units of log 2, since torch's exp2 on a CPU takes a third of its exp's time.
    """
    batch, kv_heads, rows, head_dim = query.shape
    query = query * (head_dim**-0.5 * _LOG2_E)
    output = torch.empty_like(query)
    normaliser = query.new_empty(batch, kv_heads, rows)
    for b in range(batch):
        row_bias = None if bias is None else bias[b % bias.shape[0]].reshape(-1) * _LOG2_E
        for head in range(kv_heads):
            for start in range(0, rows, _BLOCK_ROWS):
                block = slice(start, start + _BLOCK_ROWS)
                scores = linear(query[b, head, block], key[b, head], row_bias)
                highest = scores.amax(dim=-1, keepdim=True)
                weights = scores.sub_(highest).exp2_()
                total = weights.sum(dim=-1, keepdim=True)
                output[b, head, block] = linear(weights, value[b, head].t()) / total
                normaliser[b, head, block] = ((highest + total.log2()) / _LOG2_E)[:, 0]
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
