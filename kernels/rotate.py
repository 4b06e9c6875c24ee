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
