"""Eight-bit keys by channel and values by token, there and back."""

from __future__ import annotations

import torch

from kernels.quantise import (
    HEADROOM,
    dequantise_key,
    dequantise_value,
    key_scale,
    quantise_key,
    quantise_value,
)


def normal(*size: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


def test_keys_are_off_by_at_most_half_a_step_of_their_channel() -> None:
    key = normal(2, 3, 40, 16) * torch.logspace(-3, 3, 16)
    scale = key_scale(key)
    assert scale.shape == (2, 3, 16)
    back = dequantise_key(quantise_key(key, scale), scale, torch.float32)
    assert ((back - key).abs() <= scale[..., None, :] * 0.5001).all()


def test_values_are_off_by_at_most_half_a_step_of_their_token() -> None:
    value = normal(2, 3, 40, 16) * torch.logspace(-3, 3, 40)[:, None]
    steps, scale = quantise_value(value)
    assert scale.shape == (2, 3, 40)
    back = dequantise_value(steps, scale, torch.float32)
    assert ((back - value).abs() <= scale[..., None] * 0.5001).all()


def test_keys_beyond_the_sample_are_clamped_only_past_the_headroom() -> None:
    sample = normal(1, 1, 40, 8)
    scale = key_scale(sample)
    largest = sample.abs().amax(dim=-2, keepdim=True)
    for factor, fits in ((HEADROOM * 0.99, True), (HEADROOM * 1.2, False)):
        back = dequantise_key(quantise_key(largest * factor, scale), scale, torch.float32)
        assert torch.allclose(back, largest * factor, rtol=0.01) == fits
        assert (back <= largest * HEADROOM * 1.001).all()


def test_what_is_not_finite_or_always_zero_becomes_finite() -> None:
    key = torch.tensor([[[torch.nan, 1.0, 0.0], [0.5, torch.inf, 0.0]]])
    scale = key_scale(torch.ones(1, 4, 3) * torch.tensor([1.0, 1.0, 0.0]))
    assert dequantise_key(quantise_key(key, scale), scale, torch.float32).isfinite().all()
    steps, scale = quantise_value(key)
    back = dequantise_value(steps, scale, torch.float32)
    assert back.isfinite().all()
    assert (back[..., 2] == 0).all()
