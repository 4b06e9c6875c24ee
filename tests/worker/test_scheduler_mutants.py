"""The properties notice what they are there for: each of these bugs makes the property fail that forbids it."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
from hypothesis import Phase, settings

from tests.worker import scheduler_mutants as mutants
from tests.worker import test_scheduler_properties as properties
from tests.worker.scheduler_mutants import Bug, seeded

Property = Callable[[], None]

NOT_STARVED = properties.test_one_that_waits_is_not_starved_by_those_who_never_stop
IN_TURN = properties.test_every_request_has_its_turn_whatever_comes_before_it
FAIR = properties.test_the_fairness_bound_holds
NO_CREDIT = properties.test_idle_while_others_run_earns_no_credit
NOT_FORGIVEN = properties.test_who_goes_and_comes_back_is_not_forgiven
BY_WEIGHT = properties.test_a_tenant_of_twice_the_weight_is_served_twice_as_much
ALIKE = properties.test_the_same_requests_make_the_same_plans

GROUPS: list[tuple[dict[str, Bug], list[Property]]] = [
    (mutants.STARVING, [NOT_STARVED, IN_TURN]),
    (mutants.ORDER, [IN_TURN]),
    (mutants.BUDGETS, [IN_TURN, NOT_STARVED]),
    (mutants.RESIDENCE, [IN_TURN]),
    (mutants.FAIRNESS, [NO_CREDIT, NOT_FORGIVEN, BY_WEIGHT, FAIR, NOT_STARVED]),
    (mutants.CHANCE, [ALIKE]),
]
BUGS = [(name, bug, noticing) for bugs, noticing in GROUPS for name, bug in bugs.items()]


def fails(check: Property) -> bool:
    """Whether the property finds an example, the first of which is enough."""
    found = getattr(check, "_hypothesis_internal_use_settings", None)
    hurried = found and settings(found, phases=[Phase.generate], derandomize=True, database=None)
    try:
        with mock.patch.object(check, "_hypothesis_internal_use_settings", hurried, create=True):
            check()
    except Exception:
        return True
    return False


@pytest.mark.parametrize(("bug", "noticing"), [b[1:] for b in BUGS], ids=[b[0] for b in BUGS])
def test_a_seeded_bug_is_noticed(bug: Bug, noticing: list[Property]) -> None:
    with seeded(bug):
        assert any(fails(check) for check in noticing)
