"""The worker's own numbers, handed to the API with each heartbeat."""

from __future__ import annotations

from collections import Counter

# there from the start, so that rates have a beginning
_COUNTERS = (
    "forgotten_tokens_total",
    "generation_tokens_total",
    "prompt_tokens_total",
    *(f"request_success_total:{reason}" for reason in ("stop", "length", "cancelled")),
    "steps_total",
    "update_blocks_total",
    "update_tokens_total",
)


class Numbers:
    """Counters since the start, by Prometheus name (``name:label`` where there is one), and new observations."""

    def __init__(self) -> None:
        self.counters: Counter[str] = Counter(dict.fromkeys(_COUNTERS, 0))
        self._observations: dict[str, list[float]] = {}

    def count(self, name: str, amount: int = 1) -> None:
        self.counters[name] += amount

    def observe(self, name: str, value: float) -> None:
        """A sample of a histogram, in seconds."""
        self._observations.setdefault(name, []).append(value)

    def take_observations(self) -> dict[str, list[float]]:
        """The samples since the last call."""
        observations, self._observations = self._observations, {}
        return observations
