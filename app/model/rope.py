"""Rotary position embedding, in the half-rotated layout of the published Llama weights."""

from __future__ import annotations

import math
from copy import copy

import torch
from torch import Tensor

from app.model.config import ModelConfig, Rope


def inverse_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """[head_dim / 2], float32, as the reference keeps them whatever the dtype of the weights."""
    inverse = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim))
    if rope.kind == "linear":
        return inverse / rope.factor
    if rope.kind == "llama3":
        wavelength = 2 * math.pi / inverse
        low = rope.original_max_position / rope.low_freq_factor
        high = rope.original_max_position / rope.high_freq_factor
        smooth = (rope.original_max_position / wavelength - rope.low_freq_factor) / (
            rope.high_freq_factor - rope.low_freq_factor
        )
        blended = (1 - smooth) * inverse / rope.factor + smooth * inverse
        scaled = torch.where(wavelength > low, inverse / rope.factor, blended)
        return torch.where(wavelength < high, inverse, scaled)
    return inverse


class RopeTable:
    """cos and sin for the positions 0 … ``length`` - 1, each [length, head_dim] in ``dtype``.

    The first half of ``sin`` carries the minus sign of the rotation, so that rotating needs one swap of
    halves and no negation.
    """

    def __init__(self, config: ModelConfig, length: int, dtype: torch.dtype, device: torch.device) -> None:
        positions = torch.arange(length, dtype=torch.float32) * config.position_scale
        angles = positions[:, None] * inverse_frequencies(config.rope, config.head_dim)[None]
        self.cos = torch.cat([angles.cos(), angles.cos()], dim=-1).to(device, dtype)
        self.sin = torch.cat([-angles.sin(), angles.sin()], dim=-1).to(device, dtype)

    def in_float32(self) -> RopeTable:
        """The same numbers in float32."""
        table = copy(self)
        table.cos, table.sin = self.cos.float(), self.sin.float()
        return table

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos, sin of integer ``positions`` of any shape: [..., head_dim]."""
        return self.cos[positions], self.sin[positions]
