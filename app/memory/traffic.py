"""What goes on between the tiers, counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Traffic:
    """Since the start. ``hits`` counts requests by the tier in which they found their memory, ``loads`` memories
    made resident by the tier they came from; ``moved`` bytes by direction (``in`` and ``out`` of the device)."""

    hits: Counter[str] = field(default_factory=Counter)
    loads: Counter[str] = field(default_factory=Counter)
    evictions: int = 0
    moved: Counter[str] = field(default_factory=Counter)
    _seconds: list[tuple[str, float]] = field(default_factory=list)

    def loaded(self, tier: str, seconds: float, moved: int) -> None:
        """A memory has become resident, ``seconds`` after it was sent for."""
        self.loads[tier] += 1
        self.moved["in"] += moved
        self._seconds.append((tier, seconds))

    @property
    def counters(self) -> dict[str, float]:
        """By Prometheus name and label. Every label is there from the start, so that rates have a beginning."""
        counters = {"memory_evictions_total:resident": float(self.evictions)}
        for name, numbers, labels in (
            ("memory_hits_total", self.hits, ("resident", "warm", "cold")),
            ("memory_loads_total", self.loads, ("warm", "cold")),
            ("memory_moved_bytes_total", self.moved, ("in", "out")),
        ):
            counters |= {f"{name}:{label}": float(numbers[label]) for label in labels}
        return counters

    def take_seconds(self) -> dict[str, list[float]]:
        """The loads' seconds by tier since the last call."""
        taken: dict[str, list[float]] = {}
        for tier, seconds in self._seconds:
            taken.setdefault(tier, []).append(seconds)
        self._seconds = []
        return taken
