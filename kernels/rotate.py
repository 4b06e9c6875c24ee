"""Rotary embedding applied: to rows of queries and keys, and to a whole pool (the rotated-K hot copy)."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x`` [..., d_head] turned by ``cos``, ``sin`` (they broadcast), in the half-rotated Llama layout.

    The first half of ``sin`` carries the rotation's minus sign: one swap of halves, no negation.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def rotate_rows(
    qkv: Tensor, cos: Tensor, sin: Tensor, write_rows: Tensor, cache_key: Tensor, cache_value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotates the queries and keys of ``qkv`` [rows, (H + 2 H_kv) d_head], and writes K and V of its first rows to
    the rows ``write_rows`` int64 [reads] of ``cache_key`` and ``cache_value`` [cache rows, H_kv, d_head].

    ``cos``, ``sin`` [rows, d_head]. Returns Q [rows, H, d_head], K and V [rows, H_kv, d_head], Q and K rotated.
    """
    _, kv_heads, head_dim = cache_key.shape
    both = qkv.shape[1] // head_dim
    heads = qkv.view(qkv.shape[0], both, head_dim)
    query, key, value = heads.split_with_sizes([both - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    cos, sin, reads = cos[:, None], sin[:, None], write_rows.shape[0]
    query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    cache_key.index_copy_(0, write_rows, key[:reads])
    cache_value.index_copy_(0, write_rows, value[:reads])
    return query, key, value


def rotate_pool(
    key: Tensor, rank: Tensor, cos: Tensor, sin: Tensor, first_position: int, out: Tensor
) -> None:
    """Writes ``key`` [L, H_kv, S, d_head], rotated to the positions of its ranks, to ``out`` (same shape).

    ``rank`` int32 [L, S]: rank r stands at position ``first_position + r`` of the tables ``cos``, ``sin``
    [positions, d_head]. Spare slots (rank -1) are rotated to some position; readers hide them by their bias.
    """
    positions = (rank + first_position).clamp(min=0).long()
    for layer in range(key.shape[0]):
        at = positions[layer]
        out[layer] = rotate(key[layer], cos[at][None], sin[at][None])


def angles_by_channel(cos: Tensor, sin: Tensor) -> Tensor:
    """[d_head, positions] of the tables ``cos``, ``sin`` [positions, d_head]: the cosines of half the channels, then
    the sines without the rotation's signs."""
    half = cos.shape[1] // 2
    # both halves of the tables hold the same angles
    return torch.cat([cos[:, :half], sin[:, half:]], dim=1).t().contiguous()


def rotate_pool_by_channel(
    key: Tensor, rank: Tensor, angles: Tensor, first_position: int, out: Tensor
) -> None:
    """As ``rotate_pool``, but ``key`` and ``out`` are [L, H_kv, d_head, S]: a channel's values lie side by side.

    ``angles`` as ``angles_by_channel`` makes them.
    """
    positions = (rank + first_position).clamp(min=0).long().to(key.device)
    half = key.shape[2] // 2
    for layer, at in enumerate(positions):
        cos, sin = angles.index_select(1, at).chunk(2)
        first, second = key[layer, :, :half], key[layer, :, half:]
        torch.mul(first, cos, out=out[layer, :, :half]).addcmul_(second, sin, value=-1)
        torch.mul(second, cos, out=out[layer, :, half:]).addcmul_(first, sin)
