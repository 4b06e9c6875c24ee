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


class _Place(torch.autograd.Function):
    """Rows of a bank to ranks. The last `repeated` rows may be placed often, every other row at most once."""

    @staticmethod
    def forward(ctx: Any, bank: Tensor, ranks: Tensor, repeated: int) -> Tensor:
        groups, size, width = bank.shape
        ctx.save_for_backward(ranks)
        ctx.size, ctx.repeated = size, repeated
        flat = ranks + torch.arange(groups)[:, None] * size
        return bank.reshape(-1, width)[flat.flatten()].view(groups, -1, width)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (ranks,) = ctx.saved_tensors
        groups, places, width = grad.shape
        once = ctx.size - ctx.repeated
        # Copying to each row its one gradient is much faster than a scatter-add; only the repeated rows need a sum.
        # Autograd has threads of its own for a GPU, in which no default device is set.
        on = grad.device
        where = torch.full((groups, ctx.size), places, device=on).scatter_(
            1, ranks, torch.arange(places, device=on).expand(groups, -1)
        )
        where = where[:, :once] + torch.arange(groups, device=on)[:, None] * (places + 1)
        padded = torch.cat([grad, grad.new_zeros(groups, 1, width)], 1).view(-1, width)
        single = padded[where.flatten()].view(groups, once, width)
        is_row = ranks[:, None] == torch.arange(once, ctx.size, device=on)[:, None]
        return torch.cat([single, is_row.to(grad.dtype) @ grad], 1), None, None


def place(bank: Tensor, ranks: Tensor, repeated: int) -> Tensor:
    """bank [G, C, e] and ranks int64 [G, M] → [G, M, e]; only the last `repeated` of the C rows may occur twice."""
    placed: Tensor = _Place.apply(bank, ranks, repeated)  # type: ignore[no-untyped-call]
    return placed
