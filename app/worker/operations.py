"""Chooses the form of the memory's operations that suits the device: kernels, or torch where they cannot serve."""

from __future__ import annotations

import structlog
import torch

from app.model.config import ModelConfig
from app.model.operations import MakeOperations, Operations, Sizes
from app.model.rope import RopeTable
from app.model.torch_operations import TorchOperations
from app.model.trial import try_out

log = structlog.get_logger("worker")


def operations_for(sizes: Sizes, *, rotating: bool, eight_bit: bool) -> MakeOperations:
    """Kernels on CUDA devices that pass a trial, torch elsewhere; a GPU without kernels is warned of once."""

    def make(config: ModelConfig, rope: RopeTable, dtype: torch.dtype, device: torch.device) -> Operations:
        if device.type == "cuda":
            try:
                # Triton is not needed on a CPU, and takes a second to import
                from app.model.kernel_operations import KernelOperations

                kernels = KernelOperations(
                    config, rope, dtype, device, sizes=sizes, rotating=rotating, eight_bit=eight_bit
                )
                try_out(kernels, config, rope, dtype, device, sizes)
            except Exception as error:  # whatever a compiler or a driver may raise
                log.warning("torch serves in the kernels' place", reason=str(error))
            else:
                return kernels
        return TorchOperations(config, rope, dtype, device, eight_bit=eight_bit)

    return make
