"""The dense product y = x W^T + b.

On a CPU torch hands float32 products to its BLAS, which for the few rows of a decode step reaches a third
of the memory's bandwidth on common processors. oneDNN, which torch ships as well, streams the same plain
weights two to four times as fast, so float32 on a CPU goes there. A product with weights that stay in the
cache is over before oneDNN has looked up its kernel (10 us); those are left to the BLAS.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_ONEDNN = hasattr(torch.ops.mkldnn, "_linear_pointwise")
_STREAMED_ELEMENTS = 2**19


def streamed(elements: int) -> bool:
    """Whether a float32 product on a CPU with so many weights goes to oneDNN."""
    return _ONEDNN and elements >= _STREAMED_ELEMENTS


def streams(weight: Tensor) -> bool:
    """Whether a product with ``weight`` (of any shape) goes to oneDNN."""
    return streamed(weight.numel()) and weight.dtype == torch.float32 and weight.device.type == "cpu"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x`` [rows, in] (rows may be none), ``weight`` [out, in], ``bias`` [out] or None -> [rows, out]."""
    if streams(weight):
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return product
    return F.linear(x, weight, bias)
