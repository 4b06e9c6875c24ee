"""The forgetting rule: which ranks an update drops, and what that does to ranks and pools. Only here.

An update drops K of the N ranks of a layer uniformly at random, the survivors keep their order and the new
block takes the last K ranks (MemoryLLM, section 3.2). A token thus survives t updates with probability
(1 - K/N)^t. The draw depends on the tenant's seed and on the new version alone, so that a memory can be
replayed anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SEED_STRIDE = 1_000_003
MAX_SEED = 2**40


def draw(
    seed: int, version: int, *, pool_size: int, num_tokens: int, num_layers: int, per_layer: bool
) -> Tensor:
    """Ranks forgotten when ``version`` is written: int64 [num_layers or 1, K], ascending in each row.

    One row that holds for every layer unless ``per_layer``.
    """
    generator = torch.Generator().manual_seed(seed * SEED_STRIDE + version)
    rows = [torch.randperm(pool_size, generator=generator) for _ in range(num_layers if per_layer else 1)]
    return torch.stack([row[pool_size - num_tokens :] for row in rows]).sort(dim=1).values


def survivors(forgotten: Tensor, pool_size: int) -> Tensor:
    """The other ranks, ascending: int64 [rows, N - K]."""
    rows, num_tokens = forgotten.shape
    keep = torch.ones(rows, pool_size, dtype=torch.bool)
    keep.scatter_(1, forgotten, False)
    return keep.nonzero()[:, 1].view(rows, pool_size - num_tokens)


def forget(pool: Tensor, forgotten: Tensor, block: Tensor) -> Tensor:
    """The next pool: ``pool`` [L, N, ...] without the ``forgotten`` ranks, followed by ``block`` [L, K, ...]."""
    keep = survivors(forgotten, pool.shape[1])
    if keep.shape[0] == 1:
        return torch.cat([pool[:, keep[0]], block], dim=1)
    kept = torch.stack([pool[layer, keep[layer]] for layer in range(pool.shape[0])])
    return torch.cat([kept, block], dim=1)


def renumber(rank: Tensor, forgotten: Tensor) -> tuple[Tensor, Tensor]:
    """Moves ranks instead of vectors: the same rule on slots that never move.

    ``rank`` int32 [L, N + K] holds each slot's rank, -1 for the K spare ones. Returns the next rank vector
    and the slots, int64 [L, K], in which the new block's tokens lie in order (the spare ones so far).
    """
    return _renumber(rank, survivors(forgotten, rank.shape[1] - forgotten.shape[1]))


def _renumber(rank: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    layers, slots = rank.shape
    rows, kept = keep.shape
    # N + K slots and N - K survivors
    num_tokens = (slots - kept) // 2
    pool_size = slots - num_tokens
    spare = (rank < 0).nonzero()[:, 1].view(layers, num_tokens)
    next_of = torch.full((rows, pool_size), -1, dtype=torch.int32)
    next_of.scatter_(1, keep, torch.arange(kept, dtype=torch.int32).expand(rows, -1))
    moved = next_of.expand(layers, pool_size).gather(1, rank.clamp(min=0).long())
    moved = torch.where(rank < 0, rank, moved)
    new_ranks = torch.arange(kept, pool_size, dtype=torch.int32).expand(layers, -1)
    return moved.scatter(1, spare, new_ranks), spare


@dataclass(frozen=True)
class Change:
    """What the update that writes ``version`` makes of a pool's ranks; the vectors stay where they are.

    ``rank`` int32 [L, N + K] is each slot's next rank, ``slots`` int64 [L, K] are those that the block's tokens take,
    in order, and ``born`` int32 [L or 1, N] is the version that wrote each rank.
    """

    version: int
    rank: Tensor
    slots: Tensor
    born: Tensor


def change(rank: Tensor, born: Tensor, forgotten: Tensor, version: int) -> Change:
    """``rank`` and ``born`` as they are before ``version``, whose draw is ``forgotten`` int64 [L or 1, K]; they are
    left as they are, so that any thread may work this out."""
    keep = survivors(forgotten, born.shape[1])
    fresh = torch.full((born.shape[0], forgotten.shape[1]), version, dtype=born.dtype)
    return Change(version, *_renumber(rank, keep), torch.cat([born.gather(1, keep), fresh], dim=1))


def covered(
    seed: int, versions: range, *, pool_size: int, num_tokens: int, num_layers: int, per_layer: bool
) -> bool:
    """Whether the updates that made ``versions`` have written the whole pool, and all from before is forgotten."""
    rows = num_layers if per_layer else 1
    fresh = torch.zeros(rows, pool_size, dtype=torch.bool)
    block = torch.ones(rows, num_tokens, 1, dtype=torch.bool)
    for version in versions:
        forgotten = draw(
            seed,
            version,
            pool_size=pool_size,
            num_tokens=num_tokens,
            num_layers=num_layers,
            per_layer=per_layer,
        )
        fresh = forget(fresh[..., None], forgotten, block)[..., 0]
    return bool(fresh.all())


def surviving(
    seed: int,
    versions: list[int],
    now: int,
    *,
    pool_size: int,
    num_tokens: int,
    num_layers: int,
    per_layer: bool,
) -> dict[int, float]:
    """Share of each of ``versions``' tokens still in the pool at version ``now``, counted by following the pool's ranks
    back through the draws, until all are found or none can be of these versions. No pool needs to be read.
    """
    rows, oldest = num_layers if per_layer else 1, min(versions, default=now + 1)
    counts = dict.fromkeys(versions, 0)
    layer = torch.arange(rows).repeat_interleave(pool_size)
    rank = torch.arange(pool_size).repeat(rows)
    for version in range(now, oldest - 1, -1):
        older = rank < pool_size - num_tokens
        if version in counts:
            counts[version] = int((~older).sum())
        layer, rank = layer[older], rank[older]
        if version == oldest or not len(rank):
            break
        forgotten = draw(
            seed,
            version,
            pool_size=pool_size,
            num_tokens=num_tokens,
            num_layers=num_layers,
            per_layer=per_layer,
        )
        # the number r of those who were left had the r-th rank that was not forgotten
        rank = survivors(forgotten, pool_size).flatten()[rank + (pool_size - num_tokens) * layer]
    return {v: count / (rows * num_tokens) for v, count in counts.items()}
