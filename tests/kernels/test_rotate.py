"""Rotation of rows and of whole pools, against complex numbers in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.rotate import angles_by_channel, rotate, rotate_pool, rotate_pool_by_channel


def table(length: int, head_dim: int) -> tuple[Tensor, Tensor]:
    inverse = 10_000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * inverse
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], -1).float(), torch.cat([-sin, sin], -1).float()


def turned(x: Tensor, position: Tensor) -> Tensor:
    """``x`` [..., d_head] at integer positions [...], as complex products of its halves."""
    half = x.shape[-1] // 2
    inverse = 10_000.0 ** (-torch.arange(0, half, dtype=torch.float64) / half)
    angles = position.double()[..., None] * inverse
    z = torch.complex(x[..., :half].double(), x[..., half:].double())
    z = z * torch.complex(angles.cos(), angles.sin())
    return torch.cat([z.real, z.imag], -1)


@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 256])
def test_rows(head_dim: int) -> None:
    cos, sin = table(300, head_dim)
    positions = torch.tensor([0, 1, 7, 299])
    x = torch.randn(4, 3, head_dim)
    out = rotate(x, cos[positions][:, None], sin[positions][:, None])
    torch.testing.assert_close(out.double(), turned(x, positions[:, None].expand(4, 3)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("by_channel", [False, True])
@pytest.mark.parametrize("first_position", [0, 1])
def test_pool_by_ranks(first_position: int, by_channel: bool) -> None:
    layers, kv_heads, slots, head_dim = 3, 2, 19, 32
    cos, sin = table(64, head_dim)
    rank = torch.stack([torch.randperm(slots, dtype=torch.int32) for _ in range(layers)])
    rank[rank >= slots - 4] = -1
    key = torch.randn(layers, kv_heads, slots, head_dim)
    out = torch.full_like(key, torch.nan)
    if by_channel:
        lying, angles = key.transpose(2, 3), angles_by_channel(cos, sin)
        by_rows, out = out, lying.contiguous()
        rotate_pool_by_channel(lying, rank, angles, first_position, out)
        out = out.transpose(2, 3)
        # the same numbers as by rows, bit for bit
        rotate_pool(key, rank, cos, sin, first_position, by_rows)
        assert torch.equal(out, by_rows)
    else:
        rotate_pool(key, rank, cos, sin, first_position, out)
    assert torch.isfinite(out).all(), "spare slots are read with weight zero: they must be finite"
    for layer in range(layers):
        held = rank[layer] >= 0
        positions = (rank[layer][held] + first_position).expand(kv_heads, -1)
        expected = turned(key[layer][:, held], positions)
        torch.testing.assert_close(out[layer][:, held].double(), expected, atol=1e-5, rtol=1e-5)
