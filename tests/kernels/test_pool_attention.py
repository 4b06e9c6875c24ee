"""Many pools' attention at once against each alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.attention import partial_attention
from kernels.pool_attention import PoolAttention

# rows of whole cache lines: BLAS may sum differently from another alignment on
HEADS, DIM, SLOTS = 3, 16, 48


class Pool:
    """A pool with spare slots, the keys by channel, and ``rows`` queries a head."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.query = torch.randn(HEADS, rows, DIM)
        self.key, self.value = torch.randn(HEADS, SLOTS, DIM), torch.randn(HEADS, SLOTS, DIM)
        self.bias = torch.zeros(SLOTS).masked_fill_(torch.randperm(SLOTS) < 5, -torch.inf)

    def expected(self) -> tuple[Tensor, Tensor]:
        output, norm = partial_attention(
            self.query[None].double(),
            self.key[None].double(),
            self.value[None].double(),
            self.bias.double()[None, None, None],
        )
        return output.reshape(-1, DIM), norm.reshape(-1)


def attended(pools: list[Pool], scratch: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
    rows = [pool.rows for pool in pools]
    if scratch is None:
        scratch = torch.full((PoolAttention.scratch_elements(sum(rows), HEADS, DIM, SLOTS),), torch.nan)
    attend = PoolAttention(rows, HEADS, DIM, SLOTS, scratch)
    output, norm = attend(
        torch.cat([pool.query.reshape(-1, DIM) for pool in pools]),
        [pool.key.transpose(1, 2).contiguous() for pool in pools],
        [pool.value for pool in pools],
        torch.cat([pool.bias.expand(HEADS * pool.rows, SLOTS) for pool in pools]),
    )
    sizes = [HEADS * count for count in rows]
    return list(zip(output.clone().split(sizes), norm.split(sizes), strict=True))


@pytest.mark.parametrize("rows", [[1], [1, 1, 1], [2, 1, 7, 1]])
def test_each_pool_is_read_by_its_own_rows(rows: list[int]) -> None:
    pools = [Pool(count) for count in rows]
    for pool, (output, norm) in zip(pools, attended(pools), strict=True):
        wanted, wanted_norm = pool.expected()
        torch.testing.assert_close(output.double(), wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(norm.double(), wanted_norm, atol=1e-5, rtol=1e-5)


def test_neighbours_and_what_lay_in_the_scratch_change_no_bit() -> None:
    pools = [Pool(1) for _ in range(9)]
    scratch = torch.full((2 * PoolAttention.scratch_elements(9, HEADS, DIM, SLOTS),), torch.nan)
    together = attended(pools, scratch)
    for pool, (output, norm) in zip(pools, together, strict=True):
        [(alone, alone_norm)] = attended([pool])
        assert torch.equal(output, alone)
        assert torch.equal(norm, alone_norm)


def test_nan_in_one_pool_stays_there() -> None:
    pools = [Pool(1), Pool(1)]
    pools[0].value[:] = torch.nan
    first, second = attended(pools)
    assert first[0].isnan().all()
    assert second[0].isfinite().all()
