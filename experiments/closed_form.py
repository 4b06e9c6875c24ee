"""The closed form of forgetting: each update drops K of N tokens at random (MemoryLLM, section 3.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass


def survival(num_tokens: int, pool: int, age: int) -> float:
    """The expected share of a block that is left after ``age`` further updates, (1 - K/N)^age."""
    return (1 - num_tokens / pool) ** age


def deviation(num_tokens: int, pool: int, age: int) -> float:
    """The standard deviation of that share in one layer.

    Of X survivors of the block an update leaves a hypergeometric number: N - K drawn from N of which X are the block's.
    Its variance given X is X (N - X) (N - K) K / (N² (N - 1)); the law of total variance does the rest.
    """
    keep = 1 - num_tokens / pool
    factor = (pool - num_tokens) * num_tokens / (pool**2 * (pool - 1))
    mean, variance = float(num_tokens), 0.0
    for _ in range(age):
        variance = keep**2 * variance + factor * (pool * mean - mean**2 - variance)
        mean *= keep
    return math.sqrt(max(0.0, variance)) / num_tokens


@dataclass
class Survival:
    """Measured shares beside the closed form. Units are independent draws: one a layer and seed."""

    measured: float = 0.0
    expected: float = 0.0
    variance: float = 0.0
    units: int = 0

    def add(self, share: float, num_tokens: int, pool: int, age: int) -> None:
        self.measured += share
        self.expected += survival(num_tokens, pool, age)
        self.variance += deviation(num_tokens, pool, age) ** 2
        self.units += 1

    def figures(self) -> dict[str, float | None]:
        """Mean shares, the standard error of the measured mean by the closed form, and the distance in such errors."""
        if not self.units:
            return {}
        error = math.sqrt(self.variance) / self.units
        difference = (self.measured - self.expected) / self.units
        return {
            "measured": self.measured / self.units,
            "closed_form": self.expected / self.units,
            "standard_error": error,
            "distance": difference / error if error else (0.0 if abs(difference) < 1e-12 else None),
            "units": self.units,
        }
