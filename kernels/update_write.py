"""The read-side projection of memory vectors: hidden states to un-rotated K and V."""

from __future__ import annotations

from torch import Tensor

from kernels.linear import linear
from kernels.norm import rms_norm


def project_memory(
    hidden: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None, num_kv_heads: int
) -> tuple[Tensor, Tensor]:
    """``hidden`` [T, d] -> K, V, each [H_kv, T, d_head], K without rotation.

    ``norm`` [d] is the layer's input RMSNorm, ``weight`` [2 * H_kv * d_head, d] its K rows, then its V rows.
    """
    tokens = hidden.shape[0]
    projected = linear(rms_norm(hidden, norm, eps), weight, bias)
    key, value = projected.view(tokens, 2, num_kv_heads, -1).permute(1, 2, 0, 3)
    return key, value
