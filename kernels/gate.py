"""SwiGLU: the gate's SiLU times what it lets through."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_up: Tensor) -> Tensor:
    """``gate_up`` [rows, 2 n], the gate first -> [rows, n]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
