"""RMSNorm: x over the root of the mean of its squares, times a weight."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x`` [..., d], ``weight`` [d].

    On a CPU torch puts its own together from eight operations. In float32 the root of the squares' sum is one, and
    with the root of ``eps`` beside it as the other side of a triangle half of the time is saved.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return F.rms_norm(x, weight.shape, weight, eps)
    width = x.shape[-1]
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x.mul(weight).div_(torch.hypot(size.mul_(width**-0.5), _root(eps)))


def add_rms_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``x`` + ``delta`` (``x`` itself if that is None) and its RMSNorm, each [rows, d]."""
    total = x if delta is None else x + delta
    return total, rms_norm(total, weight, eps)


@cache
def _root(eps: float) -> Tensor:
    return torch.tensor(eps**0.5, dtype=torch.float32)
