"""Quantiles, Jain's index, max-min fair shares."""

from __future__ import annotations

import math

import pytest

from loadtest.figures import fair_shares, fairness, jain, mean, quantile


def test_quantiles() -> None:
    values = [float(n) for n in range(100, 0, -1)]
    assert [quantile(values, share) for share in (0.0, 0.5, 0.99, 1.0)] == [1, 50, 99, 100]
    assert quantile([7.0], 0.99) == 7
    assert math.isnan(quantile([], 0.5))
    assert math.isnan(mean([]))


def test_jain() -> None:
    assert jain([3, 3, 3]) == pytest.approx(1)
    assert jain([5, 0, 0, 0]) == pytest.approx(1 / 4)
    assert math.isnan(jain([0, 0]))


def test_nobody_is_owed_more_than_he_asks() -> None:
    shares = fair_shares({"a": 1, "hot": 1000, "b": 4}, 15)
    assert shares == {"a": 1, "b": 4, "hot": 10}
    assert fair_shares({"a": 1, "b": 2}, 100) == {"a": 1, "b": 2}
    assert fair_shares({"a": 1, "hot": 1000, "big": 100}, 15) == {"a": 1, "big": 7, "hot": 7}
    assert fair_shares({}, 1) == {}


def test_fairness() -> None:
    asked = {"light": 10.0, "hot": 1000.0}
    assert fairness(asked, {"light": 10, "hot": 90}) == pytest.approx(1)
    assert fairness(asked, {"hot": 100}) == pytest.approx(1 / 2)
