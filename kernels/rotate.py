"""The rotated-K hot copy: a tenant's un-rotated keys turned to the positions their ranks give them."""

from __future__ import annotations

from torch import Tensor

from app.model.rope import RopeTable, rotate


def rotate_pool(key: Tensor, rank: Tensor, table: RopeTable, first_position: int, out: Tensor) -> None:
    """Writes ``key`` [L, H_kv, S, d_head], rotated, to ``out`` of the same shape.

    ``rank`` int32 [L, S]; rank r stands at position ``first_position + r``. Spare slots (rank -1) are
    rotated to position 0; readers hide them by their bias.
    """
    positions = (rank + first_position).clamp(min=0).long()
    for layer in range(key.shape[0]):
        cos, sin = table.at(positions[layer])
        out[layer] = rotate(key[layer], cos[None], sin[None])
