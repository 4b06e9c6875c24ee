"""Skipping the padding of a batch: contexts and rows differ in length, and padding cost 40 % of the matrix products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Pad(torch.autograd.Function):
    """Rows [n, …] to their places among m; the other places hold an arbitrary row, which nobody may read."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, taken: Tensor) -> Tensor:
        ctx.save_for_backward(taken)
        return x[source]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad[ctx.saved_tensors[0]], None, None


class _Take(torch.autograd.Function):
    """The rows `taken` of x [m, …]; each at most once, so the backward pass is a copy and no sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, taken: Tensor) -> Tensor:
        ctx.save_for_backward(taken)
        ctx.rows = x.shape[0]
        return x[taken]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (taken,) = ctx.saved_tensors
        return grad.new_zeros(ctx.rows, *grad.shape[1:]).index_copy_(0, taken, grad), None


class Packing:
    """Moves between all places of a padded batch and the ones in use, so that matrix products skip the padding."""

    def __init__(self, used: Tensor) -> None:
        """used: bool [...], the places in use."""
        flat = used.flatten()
        self.taken = flat.nonzero()[:, 0]
        self.source = (flat.cumsum(0) - 1).clamp_(min=0)

    def pad(self, x: Tensor) -> Tensor:
        """[n, …] → [m, …]."""
        padded: Tensor = _Pad.apply(x, self.source, self.taken)  # type: ignore[no-untyped-call]
        return padded

    def take(self, x: Tensor) -> Tensor:
        """[m, …] → [n, …]."""
        packed: Tensor = _Take.apply(x, self.taken)  # type: ignore[no-untyped-call]
        return packed
