"""The dense product, the same whichever library computes it."""

from __future__ import annotations

import pytest
import torch

import kernels.linear
from kernels.linear import linear, streams


@pytest.mark.parametrize("least", [1, 2**40])
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 8, 33])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (7, 5), (64, 48), (130, 257)])
@pytest.mark.parametrize("biased", [False, True])
def test_against_float64(
    monkeypatch: pytest.MonkeyPatch, least: int, rows: int, outputs: int, inputs: int, biased: bool
) -> None:
    monkeypatch.setattr(kernels.linear, "_STREAMED_ELEMENTS", least)
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    bias = torch.randn(outputs) if biased else None
    expected = x.double() @ weight.double().T
    if bias is not None:
        expected += bias.double()
    torch.testing.assert_close(linear(x, weight, bias).double(), expected, atol=1e-4, rtol=1e-4)


def test_slices_and_transposes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.linear, "_STREAMED_ELEMENTS", 1)
    x, weight = torch.randn(20, 24), torch.randn(30, 24)
    torch.testing.assert_close(linear(x[3:9], weight[10:]), x[3:9] @ weight[10:].T)
    torch.testing.assert_close(linear(x[:, :12], weight[:, 12:]), x[:, :12] @ weight[:, 12:].T)
    torch.testing.assert_close(linear(x[:, :20], weight.T[:20].T), x[:, :20] @ weight[:, :20].T)
    value = torch.randn(24, 16)
    torch.testing.assert_close(linear(x, value.t()), x @ value)


def test_only_large_float32_weights_are_streamed() -> None:
    large = torch.zeros(1024, 1024)
    assert streams(large)
    assert not streams(large[:16])
    assert not streams(large.bfloat16())


def test_minus_infinity_as_bias_hides_an_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.linear, "_STREAMED_ELEMENTS", 1)
    bias = torch.tensor([0.0, -torch.inf, 0.0])
    y = linear(torch.randn(4, 6), torch.randn(3, 6), bias)
    assert torch.isinf(y[:, 1]).all()
    assert torch.isfinite(y[:, [0, 2]]).all()
