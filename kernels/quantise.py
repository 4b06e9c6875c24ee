"""Eight-bit pools: keys by channel before their rotation, values by token (the scheme of KIVI, arXiv 2402.02750).

A key channel's size hardly depends on the text, so its scale is fixed once from a sample, with headroom; what is
beyond it is clamped. Fixed scales mean that a block is written without touching what lies beside it.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MOST = 127
HEADROOM = 1.25


def key_scale(sample: Tensor) -> Tensor:
    """``sample`` K [..., T, d_head], un-rotated -> float32 [..., d_head]: what one step of its integers is worth."""
    largest = sample.float().abs().amax(dim=-2)
    # a channel that is always 0 needs some scale all the same
    return (largest * (HEADROOM / _MOST)).clamp_(min=torch.finfo(torch.float32).tiny)


def quantise_key(key: Tensor, scale: Tensor) -> Tensor:
    """K [..., T, d_head] -> int8 of the same shape; ``scale`` [..., d_head]. NaN becomes 0."""
    steps = (key / scale[..., None, :]).round_().nan_to_num_(0.0)
    return steps.clamp_(-_MOST, _MOST).to(torch.int8)


def quantise_value(value: Tensor) -> tuple[Tensor, Tensor]:
    """V [..., T, d_head] -> int8 of the same shape, and each token's scale, float32 [..., T]."""
    # one float32 copy and no more: of a layer of a pool that is tens of megabytes already
    wide = value.to(torch.float32, copy=True).nan_to_num_(0.0, 0.0, 0.0)
    largest = torch.maximum(wide.amax(dim=-1), -wide.amin(dim=-1))
    scale = (largest / _MOST).clamp_(min=torch.finfo(torch.float32).tiny)
    return wide.div_(scale[..., None]).round_().to(torch.int8), scale


def dequantise_key(key: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of ``quantise_key``, up to half a step."""
    return (key.float() * scale[..., None, :]).to(dtype)


def dequantise_value(value: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of ``quantise_value``, up to half a step."""
    return (value.float() * scale[..., None]).to(dtype)
