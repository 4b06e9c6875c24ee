"""The warm tier keeps within its bytes, and a copy that somebody reads stays as it is."""

from __future__ import annotations

import pytest
import torch
from structlog.testing import capture_logs

from app.memory.warm import Buffers, Seat, Warm, WarmTier

NOBODY = frozenset[str]().__contains__


class Made:
    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> Buffers:
        self.count += 1
        return Buffers((torch.zeros(1),), torch.zeros(1))


def put(tier: WarmTier, tenant: str, resident: frozenset[str] = frozenset()) -> Warm:
    seat = tier.seat(resident.__contains__)
    assert seat is not None
    assert seat.buffers.tail.shape == (1,)
    warm = Warm((0.0, 0, 1), torch.zeros(1), torch.zeros(1), seat)
    tier.put(tenant, warm)
    return warm


def test_bytes_are_bounded_and_buffers_used_again() -> None:
    made = Made()
    tier = WarmTier(35, 10, made)
    for index in range(20):
        put(tier, f"t{index}")
        assert tier.bytes <= 35
    assert made.count == len(tier) == 3
    assert [t in tier for t in ("t16", "t17", "t18", "t19")] == [False, True, True, True]
    assert tier.evictions == 17
    assert WarmTier(9, 10, made).seat(NOBODY) is None


def test_the_least_recently_used_goes_first_and_copies_of_residents_before_it() -> None:
    tier = WarmTier(30, 10, Made())
    for name in "abc":
        put(tier, name)
    tier.hold("a")
    tier.let_go("a")
    put(tier, "d", frozenset("c"))
    assert ["c" in tier, "b" in tier] == [False, True]
    assert tier.evictions == 0
    put(tier, "e")
    assert ["b" in tier, "a" in tier] == [False, True]


def test_a_held_copy_is_neither_evicted_nor_overwritten() -> None:
    tier = WarmTier(20, 10, Made())
    held = put(tier, "a")
    assert tier.hold("a") is held
    seats: list[Seat | None] = [tier.seat(NOBODY), tier.seat(NOBODY)]
    assert seats[0] is not held.seat
    assert seats[1] is None
    tier.drop("a")
    assert tier.seat(NOBODY) is None
    tier.let_go("a")
    assert tier.seat(NOBODY) is held.seat
    assert tier.hold("a") is None
    tier.let_go("a")
    assert tier.seat(NOBODY) is None, "a seat must not be given twice"


def test_a_new_copy_takes_the_place_of_the_old() -> None:
    tier = WarmTier(20, 10, Made())
    old = put(tier, "a")
    new = put(tier, "a")
    assert tier.get("a") is new
    assert tier.seat(NOBODY) is old.seat


@pytest.mark.usefixtures("all_logs")
def test_seats_whose_memory_is_not_to_be_had_are_lost_and_told_of_once() -> None:
    def failing() -> Buffers:
        raise RuntimeError("no memory")

    tier = WarmTier(50, 10, failing)
    seats = [tier.seat(NOBODY), tier.seat(NOBODY)]
    with capture_logs() as logs:
        for seat in seats:
            assert seat is not None
            with pytest.raises(RuntimeError, match="no memory"):
                _ = seat.buffers
            assert seat.lacking == "no memory"
            tier.lose(seat)
    assert [entry["error"] for entry in logs] == ["no memory"]
    assert tier.seat(NOBODY) is None
    assert tier.take_free() == []
