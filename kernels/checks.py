"""What launchers check before a kernel runs: a kernel given a wrong tensor reads or writes another tenant's memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

# whether kernels defined in this process run in Triton's interpreter, on CPU tensors
INTERPRETED = bool(triton.knobs.runtime.interpret)

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
HEAD_DIMS = range(16, 257)


class BadKernelInput(ValueError):
    """A tensor or size that a kernel cannot take; the message names it and says what was expected."""


def expect(
    name: str,
    tensor: Tensor,
    shape: Sequence[int | None],
    dtypes: Sequence[torch.dtype],
    like: Tensor,
    *,
    inner: int | None = None,
) -> None:
    """Raises ``BadKernelInput`` unless ``tensor`` has this shape (None: any size), a dtype of ``dtypes``,
    the device of ``like``, and contiguous last ``inner`` dimensions (None: all)."""
    if tensor.dim() != len(shape) or any(
        want not in (None, size) for want, size in zip(shape, tensor.shape, strict=True)
    ):
        wanted = ["any" if size is None else size for size in shape]
        raise BadKernelInput(f"{name} has shape {list(tensor.shape)}, expected {wanted}")
    if tensor.dtype not in dtypes:
        raise BadKernelInput(f"{name} is {tensor.dtype}, expected one of {[str(d) for d in dtypes]}")
    if tensor.device != like.device:
        raise BadKernelInput(f"{name} is on {tensor.device}, expected {like.device}")
    dense = 1
    for dim in reversed(range(tensor.dim() if inner is None else inner)):
        at = dim if inner is None else tensor.dim() - inner + dim
        if tensor.shape[at] > 1 and tensor.stride(at) != dense:
            raise BadKernelInput(f"{name} is not contiguous (strides {tensor.stride()})")
        dense *= tensor.shape[at]


def expect_device(tensor: Tensor) -> None:
    """Raises ``BadKernelInput`` where no kernel can run: kernels need a GPU of sm_80 or newer."""
    if INTERPRETED:
        return
    if tensor.device.type != "cuda":
        raise BadKernelInput(f"kernels run on CUDA devices, not on {tensor.device}")
    if torch.cuda.get_device_capability(tensor.device) < (8, 0):
        raise BadKernelInput("kernels need a GPU of compute capability 8.0 or newer")


def expect_range(name: str, low: int, high: int, least: int, most: int) -> None:
    """Raises ``BadKernelInput`` unless ``least`` <= ``low`` and ``high`` <= ``most``."""
    if low < least or high > most:
        raise BadKernelInput(f"{name} must be within {least} to {most}, found {low} to {high}")


def expect_head_dim(head_dim: int) -> None:
    if head_dim not in HEAD_DIMS or head_dim % 2:
        raise BadKernelInput(f"head size {head_dim} is not an even number from 16 to 256")


def elements(on_a_device: int) -> int:
    """How many elements a program takes where any number would do: in the interpreter each program takes
    milliseconds, however small it is."""
    return 2**17 if INTERPRETED else on_a_device
