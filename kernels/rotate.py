"""Rotary embedding applied: to rows of queries and keys, and to a whole pool (the rotated-K hot copy)."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x`` [..., d_head] turned by ``cos``, ``sin`` (they broadcast), in the half-rotated Llama layout.

    The first half of ``sin`` carries the rotation's minus sign: one swap of halves, no negation.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


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


def rotate_pool_by_channel(
    key: Tensor, rank: Tensor, cos: Tensor, sin: Tensor, first_position: int, out: Tensor
) -> None:
    """As ``rotate_pool``, but ``out`` is [L, H_kv, d_head, S]: a channel's values lie one behind the other."""
    positions = (rank + first_position).clamp(min=0).long()
    half = key.shape[-1] // 2
    turned = torch.empty_like(key[0])
    low, high = turned[..., :half], turned[..., half:]
    for layer in range(key.shape[0]):
        at = positions[layer].to(key.device)
        # both halves of the tables hold the same angles, with the rotation's signs
        angle_cos, angle_sin = cos[:, :half].index_select(0, at), sin[:, half:].index_select(0, at)
        first, second = key[layer, ..., :half], key[layer, ..., half:]
        torch.mul(first, angle_cos, out=low).addcmul_(second, angle_sin, value=-1)
        torch.mul(second, angle_cos, out=high).addcmul_(first, angle_sin)
        for head, lying in enumerate(turned):
            # torch transposes matrices in blocks, and nothing of more dimensions
            out[layer, head].copy_(lying.t())
