"""The work list: everything is read exactly once, in equal shares."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.checks import BadKernelInput
from kernels.plan import Plan, PlanShape

POOL = 37
BEGINNING = 64  # key rows, in whose time a segment begins


def fill(plan: Plan, reads: list[tuple[int, int, int, int]], tables: tuple[int, int] = (9, 50)) -> None:
    hot, slot, table, limit = zip(*reads, strict=True) if reads else ((), (), (), ())
    plan.fill(hot, slot, table, limit, pool_slots=POOL, pools=(6, 4), tables=tables)


def costs(plan: Plan) -> list[int]:
    """What each worker's segments take, in key rows."""
    bounds, segments = plan.workers.tolist(), plan.segments.tolist()
    return [
        sum(BEGINNING + end - start for _, start, end, *_ in segments[low:high])
        for low, high in pairwise(bounds)
    ]


reading = st.tuples(st.integers(-1, 5), st.integers(0, 8), st.integers(1, 50)).map(
    lambda r: (r[0], -1 if r[0] < 0 else r[0] % 4, r[1], r[2])
)


@settings(max_examples=150, deadline=None)
@given(
    reads=st.lists(reading, max_size=12),
    workers=st.integers(1, 9),
    group=st.integers(1, 9),
    step=st.sampled_from([1, 4, 16]),
)
def test_every_row_reads_its_keys_once(
    reads: list[tuple[int, int, int, int]], workers: int, group: int, step: int
) -> None:
    plan = Plan.allocate(PlanShape(13, workers, 16, group, step), "cpu")
    fill(plan, [(5, 1, 0, 3)] * 13)  # what an earlier step left does not show
    fill(plan, reads)
    bounds = plan.workers.tolist()
    assert bounds[0] == 0
    assert bounds == sorted(bounds)
    used = bounds[-1]
    assert used <= plan.shape.segments
    segments = plan.segments.tolist()
    # whatever may have been dealt out as it is, and one more beginning at either end of what was cut
    tiles = {tile: (end, hot) for tile, _, end, _, hot, *_ in segments[:used]}
    part = sum(BEGINNING + end for end, _ in tiles.values()) / workers
    alone = [BEGINNING + end for end, hot in tiles.values() if hot < 0 and BEGINNING + end <= part / 2]
    assert max(costs(plan)) <= part + max(alone, default=0) + 2 * BEGINNING + step
    assert sorted(segment[3] for segment in segments[:used]) == list(range(used))
    results = {segment[3]: segment for segment in segments[:used]}
    for row, (hot, slot, table, limit) in enumerate(reads):
        pool, context = plan.rows[row, :3].tolist(), plan.rows[row, 3:6].tolist()
        assert int(plan.rows[row, 6]) == limit
        for (first, last, place), source, length in (
            (pool, [hot, slot, -1], POOL if hot >= 0 else 0),
            (context, [-1, -1, table], limit),
        ):
            at = 0
            for tile, start, end, _, *reads_from in (results[n] for n in range(first, last)):
                assert reads_from == source
                assert int(plan.members[tile, place]) == row
                assert start == at
                assert end > start
                at = end
            assert at >= length
            assert at <= max([length, *(r[3] for r in reads)])
    assert not plan.rows[len(reads) :].any()


@pytest.mark.parametrize("context", [64, 1000])
@pytest.mark.parametrize(("tenants", "sequences"), [(1, 1), (1, 16), (4, 1), (16, 1), (64, 1)])
def test_no_worker_has_more_to_do_than_the_others(tenants: int, sequences: int, context: int) -> None:
    """At the 8B model's shape, on an H200: no worker gets many contexts in a row."""
    rows, tile_rows, step = tenants * sequences, (16, 64)[sequences > 1], (64, 32)[sequences > 1]
    plan = Plan.allocate(PlanShape(64, 33, tile_rows, 4, step, 64), "cpu")
    owner = [row // sequences for row in range(rows)]
    sizes = {"pool_slots": 13_056, "pools": (64, 64), "tables": (64, 1024)}
    plan.fill(owner, owner, range(rows), [context] * rows, **sizes)  # type: ignore[arg-type]
    found = costs(plan)
    assert max(found) <= 1.04 * sum(found) / len(found)
    segments, bounds = plan.segments.tolist(), plan.workers.tolist()
    contexts = [sum(s[4] < 0 for s in segments[low:high]) for low, high in pairwise(bounds)]
    # of long ones, cut as pools are, the ends of two beside a whole one
    assert max(contexts) <= max(3, -(-rows // 33) + 1)


def test_sequences_of_a_tenant_share_a_tile_of_one_version() -> None:
    plan = Plan.allocate(PlanShape(8, 4, 16, 4, 16), "cpu")
    fill(plan, [(2, 1, 0, 9), (3, 1, 1, 9), (2, 1, 2, 9), (2, 1, 3, 9), (2, 1, 4, 9), (2, 1, 5, 9)])
    assert plan.members[:3].tolist() == [[0, 2, 3, 4], [5, -1, -1, -1], [1, -1, -1, -1]]
    read = {tile: source for tile, _, _, _, *source in plan.segments[: plan.workers[-1]].tolist()}
    assert [read[tile] for tile in range(3)] == [[2, 1, -1], [2, 1, -1], [3, 1, -1]]


@pytest.mark.parametrize(
    ("read", "message"),
    [
        ((6, 0, 0, 1), "hot must"),
        ((-2, -1, 0, 1), "hot must"),
        ((0, 4, 0, 1), "slot must"),
        ((0, 0, 9, 1), "table must"),
        ((0, 0, -1, 1), "table must"),
        ((0, 0, 0, 51), "limit must"),
        ((0, 0, 0, -1), "limit must"),
        ((0, -1, 0, 1), "both"),
        ((-1, -1, 0, 0), "neither"),
    ],
)
def test_reads_out_of_range_are_refused(read: tuple[int, int, int, int], message: str) -> None:
    plan = Plan.allocate(PlanShape(2, 2, 16, 4, 16), "cpu")
    with pytest.raises(BadKernelInput, match=message):
        fill(plan, [(0, 0, 0, 1), read])


def test_lists_that_do_not_fit_are_refused() -> None:
    plan = Plan.allocate(PlanShape(2, 2, 16, 4, 16), "cpu")
    with pytest.raises(BadKernelInput, match="at most 2"):
        fill(plan, [(0, 0, 0, 1)] * 3)
    with pytest.raises(BadKernelInput, match="as long"):
        plan.fill([0], [0, 0], [0], [1], pool_slots=POOL, pools=(1, 1), tables=(1, 1))
    with pytest.raises(BadKernelInput, match="does not fit"):
        plan.copy_(Plan.allocate(PlanShape(3, 2, 16, 4, 16), "cpu"))
    with pytest.raises(BadKernelInput, match="on the host"):
        fill(Plan.allocate(plan.shape, "meta"), [(0, 0, 0, 1)])


@pytest.mark.parametrize(
    "sizes", [(0, 1, 16, 1, 16), (1, 0, 16, 1, 16), (1, 1, 24, 1, 16), (1, 1, 8, 1, 16), (1, 1, 16, 17, 16)]
)
def test_sizes_that_no_list_can_have(sizes: tuple[int, int, int, int, int]) -> None:
    with pytest.raises(BadKernelInput):
        PlanShape(*sizes)


def test_copying_moves_the_whole_list() -> None:
    host = Plan.allocate(PlanShape(3, 2, 16, 4, 16), "cpu")
    fill(host, [(0, 0, 0, 1), (1, 1, 1, 50)])
    device = Plan.allocate(host.shape, "cpu")
    device.copy_(host)
    assert torch.equal(device.rows, host.rows)
    assert np.array_equal(device.members.numpy(), host.members.numpy())
