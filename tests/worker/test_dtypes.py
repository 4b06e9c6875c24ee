"""bfloat16 weights and pools through the same engine: close to float32, and every path runs."""

from __future__ import annotations

import random

import pytest
import torch

from app.worker.scheduler import Limits
from tests.harness import NAMES, Harness, load_backbone


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_stays_near_float32(name: str) -> None:
    rng = random.Random(3)

    def text(length: int) -> list[int]:
        return [rng.randrange(3, 320) for _ in range(length)]

    contexts, prompt, probe = [text(40), text(30)], text(11), text(16)
    scores = []
    for dtype in (torch.float32, torch.bfloat16):
        harness = Harness(
            load_backbone(name, dtype)[0], slots=2, limits=Limits(step_tokens=16, cache_rows=1024)
        )
        for tenant in ("ada", "bob", "cyd"):
            harness.update(tenant, *contexts)
        ids = [harness.begin_generate(tenant, prompt, 8) for tenant in ("ada", "bob", "cyd")]
        harness.run()
        assert all(len(harness.tokens(i)) == 8 for i in ids)
        scores.append(harness.score("ada", prompt, probe).logprobs)
        memory = harness.engine.residency.get("ada")
        assert memory is not None
        assert memory.tail is not None
        assert memory.tail.dtype == dtype
    error = max(abs(a - b) for a, b in zip(*scores, strict=True))
    assert 0 < error < 0.15, "bfloat16 keeps eight bits: about 1 % of logits of a few units"
