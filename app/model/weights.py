"""The backbone's weights as the forward pass wants them: fused projections, the read adapter merged in.

One copy serves both kinds of pass. Reads use it as it is; a self-update adds the difference between its
adapter and the read adapter, as a low-rank correction on its own rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.linear import linear


@dataclass(frozen=True)
class Linear:
    """y = x W^T + b for reads; for self-updates plus (x A^T) B^T.

    ``weight`` [out, in], ``bias`` [out] or None, ``down`` A [r, in] and ``up`` B [out, r], or both None
    where reads and self-updates use the same weights.
    """

    weight: Tensor
    bias: Tensor | None = None
    down: Tensor | None = None
    up: Tensor | None = None

    def __call__(self, x: Tensor, update_rows: slice | None) -> Tensor:
        """``x`` [rows, in]; ``update_rows`` are the rows that belong to self-updates (None: no row)."""
        y = linear(x, self.weight, self.bias)
        if update_rows is not None and self.down is not None and self.up is not None:
            # not by +=, which looks the rows up twice and asks for a copy of them onto themselves
            y[update_rows].add_(linear(linear(x[update_rows], self.down), self.up))
        return y


def fuse(parts: list[Linear]) -> Linear:
    """Several projections of the same input as one: outputs side by side, corrections block-diagonal."""
    weight = torch.cat([p.weight for p in parts])
    bias = torch.cat([p.bias for p in parts if p.bias is not None]) if parts[0].bias is not None else None
    adapted = [p for p in parts if p.down is not None]
    if not adapted:
        return Linear(weight, bias)
    down = torch.cat([p.down for p in adapted if p.down is not None])
    up = weight.new_zeros(weight.shape[0], down.shape[0])
    row = column = 0
    for part in parts:
        height = part.weight.shape[0]
        if part.up is not None:
            rank = part.up.shape[1]
            up[row : row + height, column : column + rank] = part.up
            column += rank
        row += height
    return Linear(weight, bias, down, up)


@dataclass(frozen=True)
class Layer:
    """One decoder layer. ``qkv`` and ``gate_up`` are fused; norms are [d]."""

    input_norm: Tensor
    qkv: Linear
    output: Linear
    post_norm: Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True)
class Weights:
    """``memory`` [L, N, d] (on the host) and ``initialized`` are the checkpoint's own pool; ``head`` [vocab, d].

    ``bos`` [L, d] or None; ``new_memory_position`` [d] is added to a self-update's last K rows.
    """

    embedding: Tensor
    layers: tuple[Layer, ...]
    norm: Tensor
    head: Tensor
    bos: Tensor | None
    new_memory_position: Tensor
    memory: Tensor
    initialized: bool
