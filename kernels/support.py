"""Which GPUs and which models the kernels are for; all others are served by torch."""

from __future__ import annotations

import torch

from kernels.checks import FLOATS, HEAD_DIMS, INTERPRETED

# of larger heads a program cannot hold the keys it turns, and spills
ROTATED_HEAD_DIMS = range(16, 129)
# float32 products take three times the registers: with larger heads all tiles but the smallest spill
_FLOAT32_HEAD_DIMS = range(16, 65)
_LEAST_CAPABILITY = (8, 0)


def unsupported(device: torch.device, dtype: torch.dtype, head_dim: int, *, rotating: bool) -> str | None:
    """Why the kernels cannot serve such a model on ``device``, for an operator to read; None if they can.

    ``rotating``: keys are to be turned as they are read, as 8-bit pools need.
    """
    if not INTERPRETED:
        if device.type != "cuda":
            return f"kernels run on CUDA devices, not on {device.type}"
        capability = torch.cuda.get_device_capability(device)
        if capability < _LEAST_CAPABILITY:
            return f"kernels need compute capability 8.0, this GPU has {capability[0]}.{capability[1]}"
    if dtype not in FLOATS:
        return f"kernels do not compute in {dtype}"
    if head_dim not in HEAD_DIMS or head_dim % 2:
        return f"kernels take even head sizes from 16 to 256, this model's is {head_dim}"
    if dtype == torch.float32 and head_dim not in _FLOAT32_HEAD_DIMS:
        return f"kernels take heads of at most 64 in float32, this model's are {head_dim}"
    if rotating and head_dim not in ROTATED_HEAD_DIMS:
        return f"keys of heads above 128 are not rotated as they are read, this model's are {head_dim}"
    return None
