"""Muon for the stacked matrices, AdamW for everything else, with state that can be written to safetensors.

Muon (orthogonalised momentum) learns the retrieval of this model in fewer steps than AdamW; its update is scaled to
AdamW's usual size, so that one learning rate serves both.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


def orthogonalise(stack: Tensor, dtype: torch.dtype, steps: int = 5) -> Tensor:
    """Newton–Schulz iteration in `dtype` towards the nearest semi-orthogonal matrix: a stack [L, rows, columns], fp32
    out."""
    x = stack.to(dtype)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.transpose(1, 2)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.transpose(1, 2)
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * (gram @ gram)) @ x
    result: Tensor = (x.transpose(1, 2) if tall else x).float()
    return result


class Optimizer:
    """One step of both rules. `matrices` are Muon's, orthogonalised in `dtype`; state tensors are kept by parameter
    name."""

    def __init__(
        self,
        model: nn.Module,
        matrices: set[str],
        dtype: torch.dtype = torch.float32,
        weight_decay: float = 0.05,
    ) -> None:
        self.named = dict(model.named_parameters())
        self.matrices, self.dtype = matrices, dtype
        self.weight_decay = weight_decay
        self.count = 0
        self.state: dict[str, Tensor] = {}
        for name, parameter in self.named.items():
            self.state[f"{name}.first"] = torch.zeros_like(parameter)
            if name not in matrices:
                self.state[f"{name}.second"] = torch.zeros_like(parameter)

    def _directions(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Muon's update direction of every matrix. Each process orthogonalises its share of the layers."""
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        names = sorted(self.matrices)
        found = []
        for name in names:
            gradient, first = gradients[name], self.state[f"{name}.first"]
            first.lerp_(gradient, 0.05)
            direction = torch.zeros_like(gradient)
            direction[rank::world] = orthogonalise(
                gradient[rank::world].lerp(first[rank::world], 0.95), self.dtype
            )
            found.append(direction)
        if world == 1 or not names:
            return dict(zip(names, found, strict=True))
        flat = torch.cat([direction.flatten() for direction in found])
        dist.all_reduce(flat)
        pieces = torch.split(flat, [direction.numel() for direction in found])
        return {name: piece.view_as(d) for name, piece, d in zip(names, pieces, found, strict=True)}

    @torch.no_grad()
    def step(self, gradients: dict[str, Tensor], rate: float, muon_rate: float) -> None:
        """Apply one update with learning rates `rate` (AdamW) and `muon_rate`."""
        self.count += 1
        directions = self._directions(gradients)
        for name, parameter in self.named.items():
            gradient, first = gradients[name], self.state[f"{name}.first"]
            if name in self.matrices:
                # 0.2 · sqrt(larger side) gives the update the root mean square an AdamW update has.
                scale = 0.2 * max(parameter.shape[1:]) ** 0.5
                parameter.mul_(1 - muon_rate * self.weight_decay).add_(
                    directions[name], alpha=-muon_rate * scale
                )
            else:
                second = self.state[f"{name}.second"]
                first.lerp_(gradient, 0.1)
                second.mul_(0.98).addcmul_(gradient, gradient, value=0.02)
                corrected = (second / (1 - 0.98**self.count)).sqrt_().add_(1e-8)
                parameter.addcdiv_(first, corrected, value=-rate / (1 - 0.9**self.count))
