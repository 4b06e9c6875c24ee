"""The curriculum: from one block alone to a full pool of fresh, old and unrelated blocks.

Positions are those of the full pool from the first step on; early stages only cut the pool to its newest `window`
blocks. A stage is left when the moving average of exact matches passes `leave_at`; starting with a crowded pool
learns nothing, and each stage begins with a plateau.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from training.examples import GroupShape


@dataclass(frozen=True)
class Old:
    """How many old blocks a group's pool takes before all of its own, among them and after them."""

    below: int
    among: int
    above: int

    @property
    def count(self) -> int:
        return self.below + self.among + self.above

    def order(self, own: int, rng: random.Random) -> list[int]:
        """The group's own blocks, 0 to own - 1 in their order, and the old ones, from own on."""
        first, middle = own + self.below, own + self.below + self.among
        places = [*range(own), *range(first, middle)]
        if self.among:
            rng.shuffle(places)
        ordered = iter(range(own))
        mixed = [next(ordered) if block < own else block for block in places]
        return [*range(own, first), *mixed, *range(middle, own + self.count)]


@dataclass(frozen=True)
class Mixture:
    """What a step of a stage may be: `groups` groups of this shape, read from the newest `window` blocks.

    The ranges are those that the numbers of old blocks are drawn from which a group's pool takes besides its own:
    `below`, before all of its own, so that nothing is left of the initial block; `among` them; and `above`, after all
    of them, so that little is left of the group when it is asked for.
    """

    share: float
    groups: int
    shape: GroupShape
    window: int
    below: tuple[int, int] = (0, 0)
    among: tuple[int, int] = (0, 0)
    above: tuple[int, int] = (0, 0)

    def old(self, rng: random.Random) -> Old:
        """Draw the numbers of old blocks."""
        return Old(*(rng.randint(*numbers) for numbers in (self.below, self.among, self.above)))


@dataclass(frozen=True)
class Stage:
    """A step draws one of the `mixtures`, by their shares."""

    name: str
    leave_at: float
    mixtures: tuple[Mixture, ...]


def curriculum(batch: int, num_blocks: int) -> tuple[Stage, ...]:
    """The stages for `batch` contexts a step and process, and a pool of `num_blocks` blocks."""

    def mix(
        share: float, contexts: int, window: int, stale: int, **shape: float | tuple[float, float, float]
    ) -> Mixture:
        made = GroupShape(contexts, **shape)  # type: ignore[arg-type]
        return Mixture(share, batch // contexts, made, window, among=(0, stale))

    def buried(
        share: float, contexts: int, above: tuple[int, int], below: tuple[int, int] = (0, 0)
    ) -> Mixture:
        # A fact of which little is left is answered all the same, so fewer questions have no answer here.
        shape = GroupShape(contexts, colliding=0.3, changed=0.12, unknown=0.2, in_prompt=0.02)
        return Mixture(share, batch // contexts, shape, num_blocks, below=below, above=above)

    def crowded(share: float, contexts: int, among: int) -> Mixture:
        shape = GroupShape(contexts, colliding=0.4, changed=0.2, unknown=0.25, in_prompt=0.03)
        return Mixture(share, batch // contexts, shape, num_blocks, below=full, among=(0, among))

    last = {"running_text": 0.03, "changed": 0.4, "unknown": 0.35, "in_prompt": 0.12}
    three = (0.4, 0.25, 0.35)
    # behind 3 updates a block 5 % of the initial pool are left, behind 5 less than 1 %
    full = (3 * num_blocks, 5 * num_blocks)
    return (
        Stage("own block", 0.72, (mix(1.0, 1, 1, 0),)),
        Stage("two in four", 0.83, (mix(1.0, 2, 4, 0, colliding=1.0),)),
        Stage("four in eight", 0.80, (mix(0.8, 4, 8, 2, colliding=0.7), mix(0.2, 2, 16, 2, colliding=1.0))),
        Stage(
            "eight in sixteen",
            0.79,
            (
                mix(0.6, 8, 16, 8, colliding=0.6, running_text=0.02, changed=0.1),
                mix(0.2, 2, num_blocks, 0, colliding=0.7, in_prompt=0.1),
                mix(0.2, 4, 16, 8, colliding=0.5, changed=0.1),
            ),
        ),
        Stage(
            "full pool",
            2.0,
            (
                mix(0.12, 4, num_blocks, 4, facts=three, colliding=0.5, untold=0.06, **last),
                mix(0.12, 8, num_blocks, num_blocks // 4, colliding=0.5, untold=0.03, **last),
                mix(0.20, 16, num_blocks, num_blocks, colliding=0.4, **last),
                mix(0.08, 8, num_blocks, 0, colliding=1.0, changed=0.2, unknown=0.3),
                buried(0.10, 8, (num_blocks // 2, num_blocks * 6 // 5)),
                buried(0.08, 16, (num_blocks // 4, num_blocks)),
                buried(0.05, 8, (num_blocks // 4, num_blocks), full),
                crowded(0.15, 8, 8),
                crowded(0.10, 16, num_blocks),
            ),
        ),
    )
