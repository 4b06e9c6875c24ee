"""The read-side projection of memory vectors: hidden states to un-rotated K and V."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.linear import linear
from kernels.norm import rms_norm


def project_memory(
    hidden: Tensor,
    norm: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    num_kv_heads: int,
    piece: int | None = None,
) -> tuple[Tensor, Tensor]:
    """``hidden`` [T, d] -> K, V, each [H_kv, T, d_head], K without rotation.

    ``norm`` [d] is the layer's input RMSNorm, ``weight`` [2 * H_kv * d_head, d] its K rows, then its V rows.
    ``piece``: so many rows at a time are one product, so that they have the bits that they would have alone.
    """
    tokens = hidden.shape[0]
    normed = rms_norm(hidden, norm, eps)
    if piece is None or tokens <= piece:
        projected = linear(normed, weight, bias)
    else:
        pieces = (normed[start : start + piece] for start in range(0, tokens, piece))
        projected = torch.cat([linear(rows, weight, bias) for rows in pieces])
    key, value = projected.view(tokens, 2, num_kv_heads, -1).permute(1, 2, 0, 3)
    return key, value
