"""RMSNorm against its definition."""

from __future__ import annotations

import pytest
import torch

from kernels.norm import rms_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-6, 1e-2, 1.0, 1e3, 1e15])
def test_by_definition(size: float, dtype: torch.dtype) -> None:
    x, weight, eps = (torch.randn(5, 192) * size).to(dtype), torch.randn(192).to(dtype), 1e-5
    exact = x.double()
    expected = exact / (exact.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    found = rms_norm(x, weight, eps)
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)


def test_no_rows() -> None:
    assert rms_norm(torch.empty(0, 8), torch.ones(8), 1e-5).shape == (0, 8)
