"""Which token of which block lies at which rank: forgetting as served, simulated on indices.

Index c in a simulated pool means token c % K of block c // K of a bank of blocks, so that gradients reach the blocks
wherever their tokens have gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.examples import NO_LOSS, Group
from training.model import LayerWeights, MemoryModel

# What less is left of is neither known nor unknown: such questions are left out of the loss. After 50 updates of a pool
# of 50 blocks 36 % are left on average, and that must still be answered.
MIN_SURVIVAL = 0.15


def simulate(
    rng: np.random.Generator,
    pools: int,
    order: Sequence[Sequence[int]],
    initial_block: int,
    num_blocks: int,
    num_tokens: int,
) -> NDArray[np.int64]:
    """Inject blocks into `pools` pools, dropping `num_tokens` random ranks of N before each.

    order[p] lists the bank's blocks in the order pool p takes them; all have the same length. Every pool starts as
    `initial_block` repeated. Returns the bank index of every rank, int64 [pools, N].
    """
    size = num_blocks * num_tokens
    block = np.arange(num_tokens)
    state = np.tile(initial_block * num_tokens + block, (pools, num_blocks))
    for injected in np.asarray(order).T.astype(np.int64):
        dropped = np.argpartition(rng.random((pools, size), dtype=np.float32), num_tokens, 1)[:, :num_tokens]
        keep = np.ones((pools, size), dtype=bool)
        np.put_along_axis(keep, dropped, False, 1)
        kept = state[keep].reshape(pools, size - num_tokens)
        state = np.concatenate([kept, injected[:, None] * num_tokens + block], 1)
    return state


def follows(order: Sequence[Sequence[int]], own: int) -> list[int]:
    """The contexts that are written directly behind one of their own group, of every second one: context i of group g
    is number g·own + i, and `order` lists each pool's blocks as `simulate` takes them."""
    return [
        group * own + block
        for group, blocks in enumerate(order)
        for before, block in pairwise(blocks)
        if block < own and block % 2 and before == block - 1
    ]


def write_behind(
    model: MemoryModel,
    ids: Tensor,
    lengths: Tensor,
    tails: Tensor,
    behind: list[int],
    layers: list[LayerWeights] | None = None,
) -> Tensor:
    """As ``MemoryModel.write``, but the contexts `behind` see the new block of the one before them instead of a tail;
    none of those may be among `behind`. Gradients reach the earlier context."""
    if not behind:
        return model.write(ids, lengths, tails, layers)
    then = torch.tensor(behind)
    first = torch.ones(len(ids), dtype=torch.bool).index_fill(0, then, False).nonzero()[:, 0]
    new = model.write(ids[first], lengths[first], tails[:, first], layers)
    before = torch.searchsorted(first, then - 1)
    newer = model.write(ids[then], lengths[then], new[:, before], layers)
    return torch.cat([new, newer], 1)[:, torch.cat([first, then]).argsort()]


def compacted(ranks: Tensor, own: int, old: int) -> tuple[Tensor, Tensor]:
    """Leaves out of a bank of `own` rows, `old` rows and the initial block the old rows that no rank holds.

    ranks: int64 [L, G, M], the row of the bank at each rank, none of the `old` ones twice. Returns the rows at each
    rank of the smaller bank, of the same shape, and which of the old rows that keeps, int64 [L, G, S]: as many for
    every pool, so that the last ones may be at no rank.
    """
    is_old = (ranks >= own) & (ranks < own + old)
    place = is_old.cumsum(-1) - 1
    most = int(is_old.sum(-1).max())
    kept = torch.zeros(*ranks.shape[:-1], most, dtype=torch.int64)
    layer, group, rank = is_old.nonzero(as_tuple=True)
    kept[layer, group, place[layer, group, rank]] = ranks[layer, group, rank] - own
    moved = torch.where(ranks >= own + old, ranks - old + most, ranks)
    return torch.where(is_old, own + place, moved), kept


def gather_pools(bank: Tensor, ranks: Tensor) -> Tensor:
    """bank [L, G, C·K, d] and ranks int64 [L, G, M] → pools [L, G, M, d]."""
    return bank.gather(2, ranks[..., None].expand(-1, -1, -1, bank.shape[-1]))


def leave_out_forgotten(groups: Sequence[Group], ranks: Tensor, num_tokens: int) -> None:
    """Take answers from blocks of which too little is left at `ranks`, int64 [L, G, M], out of the loss."""
    whole = ranks.shape[0] * num_tokens
    for index, group in enumerate(groups):
        left = torch.bincount((ranks[:, index] // num_tokens).flatten(), minlength=len(group.examples))
        for example in group.examples:
            example.kinds = [
                NO_LOSS if block >= 0 and left[block] < MIN_SURVIVAL * whole else kind
                for kind, block in zip(example.kinds, example.told_in, strict=True)
            ]
