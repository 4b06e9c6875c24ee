"""The curriculum: from one block alone to a full pool of fresh, old and unrelated blocks.

Positions are those of the full pool from the first step on; early stages only cut the pool to its newest `window`
blocks. A stage is left when the moving average of exact matches passes `leave_at`; starting with a crowded pool
learns nothing, and each stage begins with a plateau.
"""

from __future__ import annotations

from dataclasses import dataclass

from training.examples import GroupShape


@dataclass(frozen=True)
class Stage:
    """`mixtures` are (share, groups, shape, window, stale): a step draws one of them. `stale` is the largest number
    of old blocks that are injected among the group's own."""

    name: str
    leave_at: float
    mixtures: tuple[tuple[float, int, GroupShape, int, int], ...]


def curriculum(batch: int, num_blocks: int) -> tuple[Stage, ...]:
    """The stages for `batch` contexts a step and process, and a pool of `num_blocks` blocks."""

    def mix(
        share: float, contexts: int, window: int, stale: int, **shape: float
    ) -> tuple[float, int, GroupShape, int, int]:
        return share, batch // contexts, GroupShape(contexts, **shape), window, stale  # type: ignore[arg-type]

    last = {"running_text": 0.04, "changed": 0.12, "unknown": 0.35}
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
                mix(0.25, 4, num_blocks, 0, colliding=0.5, in_prompt=0.05, untold=0.06, **last),
                mix(0.35, 8, num_blocks, num_blocks // 4, colliding=0.5, in_prompt=0.05, untold=0.03, **last),
                mix(0.3, 16, num_blocks, num_blocks, colliding=0.4, **last),
                mix(0.1, 8, 16, 8, colliding=1.0, unknown=0.3),
            ),
        ),
    )
