"""The few statistics of the report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that ``share`` of all do not exceed; NaN without values."""
    if not values:
        return math.nan
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, math.ceil(share * len(ordered)) - 1))]


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def ratio(value: float, against: float) -> float:
    return value / against if against else math.nan


def jain(values: Sequence[float]) -> float:
    """Jain's index: 1 if all have the same, 1/n if one has everything. NaN without values."""
    squares = math.fsum(value * value for value in values)
    return math.fsum(values) ** 2 / (len(values) * squares) if squares else math.nan


def fair_shares(demands: Mapping[str, float], capacity: float) -> dict[str, float]:
    """Max-min fair shares of ``capacity``: nobody gets more than he asks, what he leaves is divided among the rest."""
    shares: dict[str, float] = {}
    left, waiting = capacity, len(demands)
    for name, demand in sorted(demands.items(), key=lambda item: item[1]):
        shares[name] = min(demand, left / waiting)
        left -= shares[name]
        waiting -= 1
    return shares


def fairness(asked: Mapping[str, float], got: Mapping[str, float]) -> float:
    """Jain's index over what each got of his max-min fair share of all that was given."""
    shares = fair_shares(asked, math.fsum(got.values()))
    return jain([got.get(name, 0.0) / share for name, share in shares.items() if share > 0])
