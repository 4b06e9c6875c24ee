"""A short exploration of crashes, and every seeded bug caught by it. The long one: ``make torture``."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.faults.exploration import explore
from tests.faults.mutants import MUTANTS, caught
from tests.faults.scripts import script


def test_no_crash_loses_or_doubles_what_was_acknowledged() -> None:
    found = explore(1500, first_seed=1000)
    assert found.states >= 1500
    assert found.failures > 0
    assert found.again > 0


def test_scripts_do_everything() -> None:
    does = Counter(step.does for seed in range(200) for step in script(seed, 10))
    assert len(does) == 14
    assert min(does.values()) >= 8, does


@pytest.mark.parametrize("name", MUTANTS)
def test_a_seeded_bug_is_caught(name: str) -> None:
    assert caught(name), "the exploration does not find this bug"
